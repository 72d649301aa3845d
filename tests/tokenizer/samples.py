"""Text made up for the tests: several scripts, code, white space and the names of control tokens."""

from qwen_jax.tokenizer import controls

SENTENCES = [
    "The lower the sun, the longer the shadows; they'd shown us 1234 of them in 2024!\n",
    "  She said: \"it's NOT what I'll do\", and we've seen why.\r\n\r\n",
    "今天天气很好,我们去公园散步吧。今天天气不好,我们在家看书。\n",
    "def add(left, right):\n\treturn left + right  # 加法\n\n\nassert add(1, 22) == 23\n",
    "Ça va très bien à l'hôtel où l'on dîne; naïve façade, coöperate.\n",
    "Привет, мир! Добрый вечер, как дела? Привет, вечер!\n",
    "한국어 문장도 하나 있습니다. 안녕하세요, 안녕하세요.\n",
    "😀😃 emoji 👩‍👩‍👧‍👦 and flags 🇩🇪🇫🇷, x\u0301\u0323 marks, \u1e9b\u0323 long s.\n",
    "مرحبا بالعالم، שלום עולם, สวัสดีชาวโลก, नमस्ते दुनिया\n",
]

# Large enough that several hundred pairs occur more than once.
CORPUS = SENTENCES * 4

CONTROL_NAMES = sorted({name for table in controls.TABLES.values() for name in table})
