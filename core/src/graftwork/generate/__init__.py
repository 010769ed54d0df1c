"""Let a model write: prompts in pairs, one decode loop for two streams, callbacks before each forward pass.

Usable without the command line::

    from graftwork.generate import Decoding, decode, generate

    for answer in generate(model, tokenizer, prompts, decoding=Decoding(combiner=...), max_new_tokens=32):
        print(answer.text)
    tokens = decode(model, prompts, tokenizer=tokenizer, decoding=Decoding(combiner=...), max_new_tokens=32)
"""

from graftwork.generate.decoding import Decoding, check_pairing, decode
from graftwork.generate.paired import PairedLoop
from graftwork.generate.passes import watching
from graftwork.generate.patches import touching_layers
from graftwork.generate.prompts import Prompt, Templates, prompt_from_record
from graftwork.generate.session import Answer, generate
from graftwork.generate.trace import Trace

__all__ = [
    "Answer",
    "Decoding",
    "PairedLoop",
    "Prompt",
    "Templates",
    "Trace",
    "check_pairing",
    "decode",
    "generate",
    "prompt_from_record",
    "touching_layers",
    "watching",
]
