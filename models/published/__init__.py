"""The formats that models are published in, one file each.

A format has its config.json in both directions (`read`, `write`) and one table of tensors, which both directions use.
`fit` says whether a config can be written in a format, and what would have to differ. `engrax.models.imported` loads
and writes the files.
"""

from engrax.errors import UserError
from engrax.files import short
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published import (
    delta_net,
    gated_deltanet,
    gla,
    gpt2,
    gsa,
    hgrn2,
    kda,
    linear_attn,
    llama,
    mamba2,
    mom,
    olmo_hybrid,
    opt,
    qwen3_5,
    retnet,
)
from engrax.models.published.fields import Fields
from engrax.models.published.fit import Fit, fit
from engrax.models.published.tables import Format, Piece

MODULES = (qwen3_5, olmo_hybrid, mamba2, gpt2, opt)
OF_FLA = (gated_deltanet, delta_net, kda, gla, retnet, hgrn2, gsa, linear_attn, mom)
FORMATS = {
    form.name: form for form in (*llama.FORMATS, *(module.FORMAT for module in MODULES + OF_FLA))
}  # by the name of `engrax export --to`
ARCHITECTURES = {form.architecture: form for form in FORMATS.values()}

__all__ = ["ARCHITECTURES", "FORMATS", "Fields", "Fit", "Format", "Piece", "find_format", "fit", "read"]


def find_format(fields: Fields) -> Format:
    """The format named in a config.json; raises UserError if it is not supported."""
    if not isinstance(fields.architecture, str) or fields.architecture not in ARCHITECTURES:
        raise UserError(
            f"{fields.path}: the architecture {short(fields.architecture)} is not supported "
            f"(known: {', '.join(ARCHITECTURES)})."
        )
    return ARCHITECTURES[fields.architecture]


def read(fields: Fields) -> LanguageModelConfig:
    """The language model of a config.json. Raises UserError naming a field that is missing or not supported."""
    config = find_format(fields).read(fields)
    fields.finish()
    return config
