"""All that knows Hugging Face models.

compat.py         every name of transformers that is not its documented interface
patch.py          patch_model, unpatch_model
hooks.py          what a patch has run before and after a model's forwards
attention.py      the attention function that a patched model's layers call
description.py    what a decoder is, read off it once, at patch time
resolve.py        what patch_model's arguments come to, layer by layer (settings.py)
family.py         where a model type may differ from Llama; families.py: where each of them does
own_forwards.py   forwards for attention modules that do not ask transformers' interface
rope.py           rotary embeddings: what is read off them, and what takes their place
forward_state.py  the state of one forward, which lives in that forward
positions.py      what one forward is given: its checks, and where its tokens stand
generation.py     what generate() asks of a patched model
middle.py         middle tokens, and the memory that they need
cache/            LambdaCache, and what each layer keeps
"""
