"""Writes expected.json: what transformers' `apply_chat_template` makes of each template here.

    pip install transformers==5.24.0 jinja2==3.1.6
    python tests/golden/chat/make.py

The templates are written for these tests, in the form that the models of that name publish. The date is fixed, as quantbench fixes it.
"""

import datetime
import json
import pathlib

from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
TOKENS = {
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen-3": (None, "<|im_end|>"),
    "gemma-3": ("<bos>", "<end_of_turn>"),
    "phi-4": ("<|endoftext|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
}
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
system = lambda text: {"role": "system", "content": text}
CHATS = [
    [user("Explain quantization in simple terms.")],
    [user("  spaces, \"quotes\", <b>tags</b> & ümlauts\n\nand a {{ brace }} \n")],
    [system("Be brief. "), user("Hi")],
    [user("1 + 1?"), assistant("<think>\nadd\n</think>\n\n2"), user("and 3?")],
    [user("a"), user("b")],
]


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 12, tzinfo=tz)


chat_template_utils.datetime = Fixed
tokenizer_json = str(HERE.parent / "models/llama-tiny/tokenizer.json")
cases = []
for name, (bos, eos) in TOKENS.items():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = (HERE / f"{name}.jinja").read_text()
    for messages in CHATS:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template refuses these messages
            text = None
        cases.append({"template": name, "bos_token": bos, "eos_token": eos, "messages": messages, "text": text})
(HERE / "expected.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
