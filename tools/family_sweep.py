"""Every causal LM of the installed transformers, patched: worked, refused, or wrong.

    python tools/family_sweep.py    # writes docs/families.md and the README's count of
                                           # them, with the newest tested transformers
    python tools/family_sweep.py llama gpt_oss   # prints the rows of these types

A type that patch_model takes is built with a tiny config and random weights, and has worked when
its logits equal

- the unpatched model's while the text fits the window, layers that slide among them;
- a dense rewrite at four times the window (`tiny_models.definition`, run in the model's own code);
- its own logits with a LambdaCache at three times the training length;
- and its own logits with a LambdaCache, read in chunks and then token by token, by generate(), and
  in a row that begins with padding;

and when unpatch_model gives the unpatched model's logits back, bit for bit.

Anything else that patch_model takes is wrong. What it does not take is refused by name.
"""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
from tiny_models import TRAINED, definition, one_thread, tokens
from tiny_types import WITHOUT_AUTO, TooLargeError, in_pieces, tiny

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.compat import TESTED, cache_keyword, recurrent_layers_are_known
from lminf_cuda.models.families import ENCODER_DECODERS, FAMILIES, WRAPPERS, find_decoder

N_GLOBAL, WINDOW = 3, 12
TOLERANCE = 1e-5
# Their scores are far apart, and their own float32 logits from their float64 ones, too.
_SHARP = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "minicpm3")

OLDEST, NEWEST = TESTED
NOT_IN_OLDEST = {
    *("aya_vision", "bamba", "chameleon", "cohere2", "cohere2_vision", "ernie4_5", "ernie4_5_moe"),
    *("ernie4_5_vl_moe", "falcon_h1", "gemma3n", "gemma3n_text", "granitemoehybrid", "jamba"),
    *("lfm2", "lfm2_moe", "lfm2_vl", "moshi", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3"),
    *("olmo_hybrid", "olmoe", "paddleocr_vl", "phimoe", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba", "zamba2"),
}

# Those whose own forward raises an error with some transformers, for any text.
RAISES_UNPATCHED = {"llama4"}

# Why the others are refused.
_REFUSED = {
    "absolute positions, learned or of sines": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt"),
        *("blenderbot", "blenderbot-small", "camembert", "ctrl", "data2vec-text", "electra"),
        *("ernie", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "marian", "mbart"),
        *("megatron-bert", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "opt", "pegasus"),
        *("plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
        *("trocr", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ),
    "no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    "keys chosen by an indexer": (
        *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"),
        *("minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text"),
    ),
    "keys that stand for many tokens each": ("deepseek_v4",),
    "keys chosen by hashes": ("reformer",),
    "keys of another model": ("gemma4_assistant", "gemma4_unified_assistant"),
    "scores with a bias that depends on the query": (
        *("inkling2_loop_text", "inkling2_text", "inkling_text", "xlnet"),
    ),
    "norms with weights after the rotation, so that a score depends on more than the distance": (
        *("hunyuan_v1_dense", "hunyuan_v1_moe"),
    ),
    "layers that run in loops, over which a cache may be shared": ("dory",),
    "a mask computed from the values": ("doge",),
    "tokens that see what follows them, and biases that differ by segment": ("cpmant",),
    "slides already in all layers, with keys kept in the layers themselves": ("recurrent_gemma",),
    "linear attention that wants a cache class of its own": ("minimax",),
    "rotates by a table that ends, in attention code of its own": ("roformer",),
    "several decoders, over bytes and over groups of them": ("blt",),
}
_REASONS = {name: reason for reason, names in _REFUSED.items() for name in names}


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where either is not finite."""
    gap = (got.double() - expected.double()).abs().max()
    return float(gap.nan_to_num(nan=float("inf")))


def check(model_type: str) -> str:
    """ "" when a patched tiny model of the type is right, else what is wrong with it."""
    model = tiny(model_type)
    ids, long_ids = tokens(2, 30), tokens(1, 4 * WINDOW + 1)
    vanilla = model(ids).logits
    tolerance = TOLERANCE
    if model_type in _SHARP:
        tolerance += 2 * difference(vanilla, tiny(model_type).double()(ids).logits)
    if is_recurrent := find_decoder(model)[1].is_recurrent:  # whose states round by the step
        tolerance = 20 * TOLERANCE
    if tolerance > 20 * TOLERANCE:
        return f"the tiny model rounds too much to be checked: {tolerance:.1g}"
    fits = patch_model(tiny(model_type), n_global=N_GLOBAL, window=30)
    got = fits(ids, use_cache=False).logits
    if (error := difference(got, vanilla)) > tolerance:
        return f"off by {error:.1g} from the unpatched model within the window"
    patched = patch_model(tiny(model_type), n_global=N_GLOBAL, window=WINDOW, max_distance=20)
    with definition(model, LambdaCache(patched).settings.layers) as dense:
        expected = dense(long_ids)
    if difference(expected, model(long_ids[:, :60]).logits) < 10 * tolerance:
        return "the check cannot tell Λ attention from full attention"
    if (error := difference(patched(long_ids, use_cache=False).logits, expected)) > tolerance:
        return f"off by {error:.1g} from the definition at four times the window"
    if is_recurrent and not LambdaCache(patched).settings.recurrent_states:
        return "the tiny config has no recurrent layer"
    got = in_pieces(patched, long_ids, LambdaCache(patched))
    if (error := difference(got, expected)) > tolerance:
        return f"off by {error:.1g} with the cache"
    far = tokens(1, 3 * TRAINED + 8)  # where a table of positions would have ended
    cache = cache_keyword(patched, LambdaCache(patched))
    pieces = far.split(
        [len(far[0]) - 1, 1] if find_decoder(model)[1].reads_once else 3 * TRAINED, 1
    )
    got = torch.cat([patched(piece, **cache).logits for piece in pieces], dim=1)
    if (error := difference(got, patched(far, use_cache=False).logits)) > tolerance:
        return f"off by {error:.1g} with the cache at three times the training length"
    written = patched.generate(long_ids, max_new_tokens=4, do_sample=False)
    logits = patched(written, use_cache=False).logits
    if not torch.equal(logits[:, -5:-1].argmax(-1), written[:, -4:]):
        return "generate() writes other tokens than without a cache"
    mask = torch.ones(2, long_ids.shape[1], dtype=torch.int64)
    mask[1, : -WINDOW - 5] = 0
    alone = patched(long_ids[:, -WINDOW - 5 :], use_cache=False).logits
    both = long_ids.expand(2, -1)
    padded = [
        patched(both, attention_mask=mask, use_cache=False).logits,
        patched(both, attention_mask=mask, use_cache=True).logits,
    ]
    if model_type not in WRAPPERS:  # some of which count a piece's positions from its whole mask
        padded.append(in_pieces(patched, both, LambdaCache(patched), mask))
    for rows in padded:
        error = max(difference(rows[:1], expected), difference(rows[1:, -WINDOW - 5 :], alone))
        if error > tolerance:
            return f"off by {error:.1g} in a padded batch"
    if not torch.equal(unpatch_model(fits)(ids).logits, vanilla):
        return "unpatched, its logits are not what they were"
    return ""


def verdict(model_type: str, verbose: bool = False) -> tuple[str, str]:
    """ "worked", "refused", "wrong" or "not built", and what there is to say."""
    if model_type not in FAMILIES and model_type not in WRAPPERS:
        return "refused", _REASONS.get(model_type, "not looked into")
    if (
        model_type in FAMILIES
        and FAMILIES[model_type].is_recurrent
        and not recurrent_layers_are_known()
    ):
        return "refused", "recurrent layers, which this transformers' caches do not know"
    try:
        model = tiny(model_type)
    except StrictDataclassFieldValidationError:
        return "not built", "this transformers refuses the type's own default config"
    except TooLargeError as error:
        return "not built", str(error)
    try:
        model(tokens(2, 30))
    except Exception as error:
        return "not built", f"unpatched, transformers' own forward raises {error!r}"
    try:
        patch_model(model, window=WINDOW)
    except ValueError as error:
        return "refused", str(error).partition(";")[0]
    try:
        problem = check(model_type)
    except Exception as error:
        problem = traceback.format_exc() if verbose else repr(error)
    return ("wrong", problem) if problem else ("worked", "")


def all_wrappers() -> list[str]:
    """The model types that this transformers builds from text and something else."""
    return sorted(
        {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    )


def all_types() -> list[str]:
    """The model types of AutoModelForCausalLM, and those that it leaves out."""
    left_out = (name for name, cls in WITHOUT_AUTO.items() if hasattr(transformers, cls))
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *left_out})


def filled(page: str, rows: dict[str, tuple[str, str]]) -> str:
    """docs/families.md with what `rows` say in the places of what it said."""
    names: dict[str, list[str]] = {"worked": [], "refused": [], "wrong": [], "not built": []}
    reasons: dict[str, list[str]] = {}
    for name, (found, reason) in rows.items():
        names[found].append(name)
        if found != "worked":
            reasons.setdefault(reason, []).append(name)
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in names.items())
    plain, recurrent, around = by_kind(names["worked"])
    lists = {
        "## Causal language models\n\n": plain,
        "## With recurrent or convolution layers\n\n": recurrent,
        "## Around a language model\n\n": around,
        "## Encoder-decoders\n\n": sorted(ENCODER_DECODERS),
    }
    parts = {rf"(?<=^{heading}).*": ", ".join(found) for heading, found in lists.items()} | {
        r"^transformers \S+, \d+ model types: .*": f"transformers {transformers.__version__}, "
        f"{len(rows)} model types: {counts}.",
        r"(?<=^Of those that it has, transformers )\S+": OLDEST,
        r"(?<=^checked with it:\n).*": f"{', '.join(sorted(NOT_IN_OLDEST))}.",
        r"(?<=^\| --- \| --- \|\n)(\|.*\n)+": "".join(
            f"| {reason} | {', '.join(sorted(found))} |\n"
            for reason, found in sorted(reasons.items())
        ),
    }
    for pattern, text in parts.items():
        page, n = re.subn(pattern, text.replace("\\", r"\\"), page, count=1, flags=re.M)
        if n == 0:
            raise ValueError(f"docs/families.md has no place like {pattern!r}")
    return page


_BEGIN, _END = "<!-- written by family_sweep.py -->", "<!-- until here -->"


def by_kind(worked: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Types that worked: of causal LMs, of those with recurrent layers, and around one of them."""
    around = [name for name in worked if name in WRAPPERS]
    inside = [name for name in worked if name not in WRAPPERS]
    recurrent = [name for name in inside if FAMILIES[name].is_recurrent]
    return [name for name in inside if name not in recurrent], recurrent, around


def readme_count(worked: list[str]) -> str:
    """The README's sentence on the model types that worked, between its markers."""
    plain, recurrent, around = by_kind(worked)
    sentence = (
        f"`patch_model` serves {len(worked) + len(ENCODER_DECODERS)} model types of transformers: "
        f"{len(plain)} causal language models, {len(recurrent)} with recurrent or convolution "
        f"layers besides attention, the language model inside {len(around)} that also see or hear, "
        f"and {len(ENCODER_DECODERS)} encoder-decoders. [docs/families.md](docs/families.md) names "
        "them, and those that are refused with the reason for each."
    )
    return "\n".join([_BEGIN, textwrap.fill(sentence, 100, break_on_hyphens=False), _END])


def write(rows: dict[str, tuple[str, str]]) -> None:
    """Writes docs/families.md and the README's count of model types."""
    root = Path(__file__).parents[1]
    families = root / "docs" / "families.md"
    families.write_text(filled(families.read_text(), rows))
    written = readme_count([name for name, (found, _) in rows.items() if found == "worked"])
    readme = root / "README.md"
    text = readme.read_text()
    between = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", flags=re.S)
    readme.write_text(between.sub(lambda _: written, text))


def main() -> None:
    """The command of this file's docstring; -v prints where a wrong type failed."""
    asked = [word for word in sys.argv[1:] if word != "-v"]
    transformers.logging.set_verbosity_error()
    rows = {}
    with one_thread(), torch.no_grad():
        wrappers = set(WRAPPERS) & set(all_wrappers())
        for model_type in asked or [*all_types(), *sorted(wrappers - set(all_types()))]:
            rows[model_type] = verdict(model_type, verbose="-v" in sys.argv)
            print(model_type, *rows[model_type], flush=True)
    if not asked and transformers.__version__ == NEWEST:
        write(rows)
    if any(found == "wrong" for found, _ in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
