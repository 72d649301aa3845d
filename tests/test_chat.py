"""The command: streams, keeps the conversation, survives Ctrl-C, answers JSON lines, and names what is wrong."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys

import jax
import optax
import pytest

from qwen_jax import chat, hf, models, rollout, tokenizer
from qwen_jax.errors import InputError
from qwen_jax.training import checkpoint, state
from qwen_jax.training import workdir as workdirs
from tests.conftest import tiny

GREETING = "Grüße 😀 and 你好!"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random tiny model, whose vocabulary has padding rows."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tok = tokenizer.train(["hello there, how are you? " * 20], 270)
    config = tiny(num_hidden_layers=1, vocab_size=320)
    hf.save(folder, config, models.init(config, jax.random.key(0)))
    tok.save(folder)
    return folder


@pytest.fixture(scope="session")
def model(folder):
    return chat.load(chat.Chat(str(folder), max_new_tokens=8))


@pytest.fixture
def scripted(monkeypatch, model):
    """Makes the model say GREETING, one byte a token, whatever it is asked; records the prompts."""
    prompts = []

    def stream(config, weights, prompt, key, **options):
        prompts.append(model.tok.decode(prompt))
        spelt = {model.tok.token_bytes(i): i for i in range(256)}
        return iter([spelt[bytes([byte])] for byte in GREETING.encode()] + [model.tok.special_tokens["<|im_end|>"]])

    monkeypatch.setattr(rollout, "stream", stream)
    return prompts


def script(*lines):
    """An `ask` that types these lines and then Ctrl-D; an exception among them is raised, as Ctrl-C would."""
    left = list(lines)

    def ask(_):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    return ask


class Screen(io.StringIO):
    """Keeps what was written piece by piece; presses Ctrl-C after a given number of pieces."""

    def __init__(self, interrupt_after=None):
        super().__init__()
        self.pieces, self.interrupt_after = [], interrupt_after

    def write(self, text):
        self.pieces.append(text)
        if len(self.pieces) == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_characters_come_whole_and_the_stop_token_is_not_shown(model, scripted):
    pieces = list(model.answer([{"role": "user", "content": "hi"}], jax.random.key(0)))
    assert "".join(pieces) == GREETING
    assert "😀" in pieces and len(pieces) == len(GREETING)


def test_a_conversation_grows_and_new_starts_over(model, scripted):
    screen = Screen()
    chat.converse(model, script("first", "second", "/new", "third"), screen)
    assert screen.getvalue().count(GREETING) == 3
    said = f"<|im_start|>assistant\n{GREETING}<|im_end|>"
    assert "first" in scripted[1] and said in scripted[1] and scripted[1].endswith("<|im_start|>assistant\n")
    assert "first" not in scripted[2] and said not in scripted[2] and "third" in scripted[2]


@pytest.fixture
def ctrl_c():
    """Python's own handling of SIGINT, which a shell that starts the tests in the background takes away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(model, scripted, ctrl_c):
    screen = Screen(interrupt_after=5)  # the hint, its newline, and three pieces
    chat.converse(model, script("first", KeyboardInterrupt, "second", "/exit", "never"), screen)
    assert "(stopped)" in screen.getvalue() and "Ctrl-D or /exit leaves" in screen.getvalue()
    assert len(scripted) == 2 and "never" not in scripted[1]
    assert "<|im_start|>assistant\nGr" in scripted[1] and GREETING not in scripted[1]


def test_a_conversation_that_is_too_long_is_said_and_not_kept(model, scripted):
    screen = Screen()
    chat.converse(model, script("x " * 500, "short"), screen)
    assert "error: the conversation has" in screen.getvalue()
    assert len(scripted) == 1 and "short" in scripted[0] and "x x" not in scripted[0]


def test_the_system_flag_comes_first_unless_a_conversation_has_its_own(folder, model):
    flags = chat.Chat(str(folder), system="Be brief.")
    brief = chat.Model(model.config, model.weights, model.tok, flags)
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "hi"}]
    assert model.tok.decode(brief.ids(own[1:])).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert model.tok.decode(brief.ids(own)).startswith("<|im_start|>system\nRhyme.<|im_end|>")


def test_json_lines_get_answers_that_do_not_depend_on_the_batch(folder, model):
    requests = [{"prompt": f"number {'x' * i}", "id": i} for i in range(2)]
    requests.append({"messages": [{"role": "user", "content": "hello"}]})
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    found = []
    for batch_size in (2, 3):
        flags = chat.Chat(str(folder), max_new_tokens=8, batch_size=batch_size)
        out = io.StringIO()
        chat.answer_lines(chat.Model(model.config, model.weights, model.tok, flags), io.StringIO(lines), out)
        found.append([json.loads(line) for line in out.getvalue().splitlines()])
    assert found[0] == found[1]
    for request, answer in zip(requests, found[0], strict=True):
        assert answer.items() >= request.items()
        assert answer["finished"] or answer["num_tokens"] == 8
        assert isinstance(answer["completion"], str)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "input line 2: not JSON"),
        ("[]", 'input line 2: expected an object with either "prompt" or "messages"'),
        ('{"prompt": 3}', r"input line 2: messages\[0\]: content is int"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "input line 2: .*role is 'king'"),
        (json.dumps({"prompt": "x " * 500}), "input line 2: .* tokens and --max-new-tokens 8 exceed 128"),
    ],
)
def test_a_bad_line_is_named_by_its_number(model, line, words):
    with pytest.raises(InputError, match=words):
        chat.answer_lines(model, io.StringIO("\n" + line), io.StringIO())


def test_the_lines_before_a_bad_one_are_answered(model):
    out = io.StringIO()
    with pytest.raises(InputError, match="input line 2"):
        chat.answer_lines(model, io.StringIO('{"prompt": "hi"}\n{'), out)
    assert json.loads(out.getvalue())["prompt"] == "hi"


def test_the_input_is_never_overwritten(folder, tmp_path, capsys):
    file = tmp_path / "same.jsonl"
    file.write_text('{"prompt": "hi"}\n')
    with pytest.raises(SystemExit) as caught:
        chat.main(["--checkpoint", str(folder), "--input", str(file), "--output", str(tmp_path / "." / "same.jsonl")])
    assert caught.value.code == 2 and "which would be lost" in capsys.readouterr().err
    assert file.read_text() == '{"prompt": "hi"}\n'


def test_a_reader_that_goes_away_is_no_error(folder, tmp_path):
    (tmp_path / "many.jsonl").write_text('{"prompt": "hi"}\n' * 3)
    command = [sys.executable, "-m", "qwen_jax.chat", "--checkpoint", str(folder), "--max-new-tokens", "2"]
    command += ["--batch-size", "1", "--input", str(tmp_path / "many.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0 and "Error" not in error and "error" not in error, error


def test_a_run_of_ours_answers_like_the_same_weights_published(folder, model, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        model: object

    config, params = hf.load(folder, dtype="float32")
    run = workdirs.prepare(tmp_path / "run", Config(config), experiment="test", recipe="tiny")
    checkpoints = checkpoint.Checkpoints(run)
    checkpoints.save(state.create(params, jax.random.key(0), optax.sgd(0.1)), {}, {"validation/loss": 1.0})
    checkpoints.close()
    model.tok.save(run / "tokenizer")
    ours = chat.load(chat.Chat(str(run), max_new_tokens=8))
    say = lambda model: "".join(model.answer([{"role": "user", "content": "hello"}], jax.random.key(1)))
    assert say(ours) == say(model)


def test_the_template_goes_by_the_tokenizers_control_tokens(model):
    expected = {"qwen": "qwen", "qwen1.5": "qwen2", "qwen2": "qwen2", "qwen2.5": "qwen2.5", "qwen3": "qwen3"}
    for table, template in expected.items():
        names = tokenizer.controls.table(table)
        tok = tokenizer.ByteBPE(model.tok.vocabulary, {n: model.tok.regular_size + i for i, n in enumerate(names)})
        assert chat.Model(model.config, model.weights, tok, model.flags).generation == template


def test_the_command_answers_one_prompt_on_standard_output(folder):
    command = [sys.executable, "-m", "qwen_jax.chat", "--checkpoint", str(folder), "--max-new-tokens", "4"]
    done = subprocess.run([*command, "--prompt", "hello", "--temperature", "0"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n") and "loading" not in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "/nowhere"], "error: .*/nowhere"),
        (["--max-new-tokens", "0", "--prompt", "x"], "error: --max-new-tokens is 0; expected at least 1"),
        (["--temperature", "-1", "--prompt", "x"], "error: temperature is -1.0"),
        (["--tensor", "3", "--prompt", "x"], "error: .*cannot be split"),
        (["--prompt", "x", "--input", "y"], "error: --prompt and --input are two ways to ask"),
        (["--input", "/nowhere/in"], "error: /nowhere/in: No such file"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        chat.main([*([] if "--checkpoint" in flags else ["--checkpoint", str(folder)]), *flags])
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert re.match(words, last), last
