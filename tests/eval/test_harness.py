"""The harness's three requests, against whole forward passes of one text at a time, and `rollout.generate`."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import hf, models, rollout, sharding, tokenizer
from qwen_jax.errors import InputError
from qwen_jax.eval import HarnessModel, __main__, scoring
from qwen_jax.sharding import Layout
from tests.conftest import MESHES, tiny

TOK = tokenizer.train((f"{n} plus {m} is {n + m}.\n" for n in range(40) for m in range(9)), 266)
END = TOK.special_tokens["<|endoftext|>"]
LONGEST = 48
MODEL = tiny(
    vocab_size=272, tie_word_embeddings=False, initializer_range=0.3, max_position_embeddings=LONGEST
)  # weights large enough that answers differ
PARAMS = models.init(MODEL, jax.random.key(0))


def model(mesh=None, *, batch_size=4, **options):
    layout = Layout(None if mesh is None else sharding.make_mesh(MESHES[mesh]))
    where = sharding.tree_shardings(models.axes(MODEL), PARAMS, layout) if mesh else None
    return HarnessModel(MODEL, jax.device_put(PARAMS, where), TOK, layout=layout, batch_size=batch_size, **options)


def asked(*args):
    return types.SimpleNamespace(args=args)


PAIRS = [
    ("3 plus 4 is", " 7."), ("3 plus 4 is ", "7."), ("", "9 plus"), (" ", "1"), ("12 plus 8 is", " 20.\n1 plus 1 is"),
    ("a <|im_end|> b", " <|endoftext|>"), ("你好", "吗"), ("1 plus 2 is 3.\n" * 20, "4 plus 4"),
]  # fmt: skip


def scored(context, continuation):
    """The sum of `sequence_log_probs` over the continuation of one text read alone, and whether it is greedy."""
    ids = ([*context, *continuation])[-LONGEST - 1 :]
    start = len(ids) - len(continuation)
    row = np.zeros((1, LONGEST + 1), np.int32)  # one shape; what follows a token does not matter to it
    row[0, : len(ids)] = ids
    row = jnp.asarray(row)
    marks = dict(positions=jnp.arange(LONGEST + 1)[None], segment_ids=jnp.ones_like(row))
    log_probs = models.sequence_log_probs(MODEL, PARAMS, row, **marks)[0]
    likeliest = jnp.argmax(models.forward(MODEL, PARAMS, row, **marks)[0], axis=-1)
    places = range(start - 1, len(ids) - 1)
    return sum(float(log_probs[i]) for i in places), all(int(likeliest[i]) == ids[i + 1] for i in places)


def cut(context, continuation):
    """As the harness: spaces before a continuation are its own, and its ids are the rest of the whole's."""
    bare = context.rstrip()
    if not bare:
        return [END], TOK.encode(context + continuation)
    ids = TOK.encode(bare)
    return ids, TOK.encode(context + continuation)[len(ids) :]


@pytest.mark.parametrize("mesh", [None, "fsdp2-context2-tensor2"])
def test_loglikelihood_is_that_of_each_continuation_read_alone(mesh):
    found = model(mesh).loglikelihood([asked(*pair) for pair in PAIRS])
    expected = [scored(*cut(*pair)) for pair in PAIRS]
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-5)  # float32, summed otherwise
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_what_greedy_decoding_answers_is_greedy():
    """The other requests are not, so that a constant would pass for the test above."""
    context = TOK.encode("3 plus 4 is")
    answer = rollout.generate(MODEL, PARAMS, [context], jax.random.key(0), max_new_tokens=5, temperature=0.0)
    ids = np.asarray(answer.tokens)[0].tolist()
    right, wrong = scoring.score(
        MODEL, PARAMS, [(context, ids), (context, [*ids[:-1], (ids[-1] + 1) % 266])], batch_size=2, layout=Layout()
    )
    assert right.greedy and not wrong.greedy


@pytest.mark.parametrize("length", [0, 1, LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST + 5])
def test_rolling_predicts_each_token_once_with_as_much_before_it_as_the_windows_hold(length):
    ids = [int(i) for i in np.random.default_rng(length).integers(0, 250, length)]
    pairs = scoring.windows(ids, END, LONGEST)
    assert [i for _, continuation in pairs for i in continuation] == ids
    for place, (context, continuation) in enumerate(pairs):
        start = place * LONGEST
        before = ([END, *ids])[: start + 1]
        # All but the last window begin anew after one token; the last is moved back until it is full.
        room = 1 if place == 0 or start + LONGEST <= length else LONGEST + 1 - len(continuation)
        assert context == before[-room:]
    try:
        from lm_eval import utils
    except ImportError:
        return  # the rule above is the harness's own; where it is installed it is asked, too
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, END, LONGEST, 1))
    assert [(list(a), list(b)) for a, b in theirs] == pairs


def test_rolling_sums_its_windows():
    texts = ["1 plus 2 is 3.\n" * 9, "", "4"]
    found = model().loglikelihood_rolling([asked(text) for text in texts])
    expected = [sum(scored(*pair)[0] for pair in scoring.windows(TOK.encode(text), END, LONGEST)) for text in texts]
    assert found == pytest.approx(expected, rel=1e-5) and found[1] == 0


CONTEXTS = ["3 plus 4 is", "", "1 plus 2 is 3.\n" * 9, "7 plus <|im_end|>", "2 plus"]


@pytest.fixture(scope="module")
def whole():
    """The greedy answer to each of CONTEXTS, up to the model's own end."""
    ids = [(TOK.encode(context) or [END])[-(LONGEST - 12) :] for context in CONTEXTS]
    answers = rollout.generate(
        MODEL, PARAMS, ids, jax.random.key(0), max_new_tokens=12, temperature=0.0, num_tokens=TOK.vocab_size,
        stop_ids=tokenizer.chat.stop_ids(TOK),
    )  # fmt: skip
    texts = [
        TOK.decode(tokens[:length].tolist(), skip_special=True)
        for tokens, length in zip(np.asarray(answers.tokens), np.asarray(answers.lengths), strict=True)
    ]
    assert len(set(texts)) == len(CONTEXTS)
    return texts


@pytest.mark.parametrize("mesh", [None, "fsdp2-context2-tensor2"])
def test_answers_are_greedy_ones_cut_at_the_first_stop(whole, mesh):
    longest = max(whole, key=len)
    inner = longest[3:5]  # two characters of an answer, wherever tokens begin
    ours = model(mesh, batch_size=8)
    options = {"until": [inner, "zzz"], "max_gen_toks": 12}
    found = ours.generate_until([asked(context, options) for context in CONTEXTS])
    assert found == [text.split(inner)[0] for text in whole]
    assert found[whole.index(longest)] == longest[: longest.index(inner)] != longest
    if mesh:
        return
    # Requests with other options among them; each answer stays with its own.
    mixed = [asked(context, options if n % 2 else {"max_gen_toks": 12}) for n, context in enumerate(CONTEXTS)]
    assert ours.generate_until(mixed) == [found[n] if n % 2 else whole[n] for n in range(len(CONTEXTS))]


def test_a_token_that_holds_the_stop_ends_the_answer():
    ours = model()
    assert [TOK.decode([index]) for index in ours._ending("is")] == [
        text for index in range(TOK.vocab_size) if "is" in (text := TOK.decode([index])) and "<|" not in text
    ]
    assert ours._ending("<|im_end|>") == (TOK.special_tokens["<|im_end|>"],) and ours._ending("") == ()


def test_few_programs_are_compiled():
    ours, rng = model(), np.random.default_rng(0)
    ours.loglikelihood([asked("1" * int(n), "2") for n in rng.integers(1, 40, 40)])
    before = scoring._score._cache_size()
    ours.loglikelihood([asked("3" * int(n), "45") for n in rng.integers(1, 40, 40)])
    assert scoring._score._cache_size() == before <= 12


def test_a_chat_template_is_the_models_own_and_its_marks_are_no_text():
    said = [{"role": "user", "content": "3 <|im_end|> plus"}, {"role": "assistant", "content": "is\n"}]
    ours = model()
    for messages, options in ((said[:1], {}), (said, {})):
        ids, _ = tokenizer.chat.render(messages, TOK, generation="qwen2", add_generation_prompt=True)
        assert ours._encode(ours.apply_chat_template(messages, **options)) == ids
    opened = ours._encode(ours.apply_chat_template(said, add_generation_prompt=False))
    whole, _ = tokenizer.chat.render(said, TOK, generation="qwen2")
    assert opened == whole[: len(opened)] and whole[len(opened)] == TOK.special_tokens["<|im_end|>"]
    # Marks of one model mean nothing to another: they cannot be guessed.
    foreign = model()._encode(ours.apply_chat_template(said[:1]))
    assert not set(foreign) & set(TOK.special_tokens.values())


@pytest.mark.parametrize("request_, kind, message", [
    (asked("a", "1 plus 2 is 3.\n" * 30), "loglikelihood", "tokens of its own; expected 1 to 48"),
    (asked("a", ""), "loglikelihood", "has 0 tokens of its own"),
    (asked("a", {"untill": []}), "generate_until", "the option 'untill' of an answer is not known"),
    (asked("a", {"max_gen_toks": 48}), "generate_until", "max_gen_toks is 48; the model reads 48 tokens"),
])  # fmt: skip
def test_requests_that_cannot_be_answered_are_one_line(request_, kind, message):
    with pytest.raises(InputError, match=message):
        getattr(model(), kind)([request_])


def test_the_command_without_the_harness_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["--checkpoint", "x", "--tasks", "y"])
    assert "error: lm_eval is missing" in (told := capsys.readouterr().err) and "qwen_jax[eval]" in told


TASKS = {
    "sums_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["7.", "8."],
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    },
    "sums_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "sums_open": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def test_local_tasks_run_offline_through_the_harness(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval (the extra `eval`) brings pandas, scikit-learn and their like")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    hf.save(tmp_path / "model", MODEL, PARAMS)
    TOK.save(tmp_path / "model")
    questions = [f"{a} plus {7 - a} is" for a in range(6)]
    ours = model(max_new_tokens=8)
    answers = ours.generate_until([asked(text, {"until": ["\n"], "max_gen_toks": 8}) for text in questions])
    docs = [
        {"question": text, "answer": n % 2, "said": said if n < 4 else "no"}
        for n, (text, said) in enumerate(zip(questions, answers, strict=True))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    for name, fields in TASKS.items():
        data = {"task": name, "dataset_path": "json", "test_split": "test"}
        data |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}, **fields}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data))  # YAML reads JSON
    out = tmp_path / "results.json"
    __main__.main(
        [
            "--checkpoint",
            str(tmp_path / "model"),
            "--tasks",
            ",".join(TASKS),
            "--include",
            str(tmp_path),
            "--output",
            str(out),
        ]
    )
    results = json.loads(out.read_text())["results"]
    better = [max((0, 1), key=lambda n, text=text: scored(*cut(text, f" {7 + n}."))[0]) for text in questions]
    assert results["sums_choice"]["acc,none"] == np.mean(
        [a == doc["answer"] for a, doc in zip(better, docs, strict=True)]
    )
    assert results["sums_open"]["exact_match,none"] == pytest.approx(4 / 6)
    nats = sum(ours.loglikelihood_rolling([asked(text) for text in questions]))
    words = sum(len(text.split()) for text in questions)
    assert results["sums_text"]["word_perplexity,none"] == pytest.approx(np.exp(-nats / words), rel=1e-4)
    assert "sums_open" in capsys.readouterr().out
