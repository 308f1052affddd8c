"""Import and export of published checkpoints (Hugging Face layouts) as engrax language models.

    config = imported.read_config("SmolLM-135M")        # a LanguageModelConfig
    model  = imported.load("SmolLM-135M")               # its module, parameters included
    imported.export(model, "out", like="SmolLM-135M")   # the same tensors, in the same files
    publish.publish(model, "out", FORMATS["llama"])     # files of its own (`imported.publish`, `models.published`)

A folder holds config.json and model.safetensors, or model.safetensors.index.json and the files it lists.
`engrax.data.tokenizers.load_tokenizer` reads its tokenizer.json.
"""

from engrax.models.imported.checkpoint import (
    check,
    check_export,
    describe_source,
    export,
    find_backbone,
    load,
    merge,
    read_config,
    read_params,
)

__all__ = [
    "check",
    "check_export",
    "describe_source",
    "export",
    "find_backbone",
    "load",
    "merge",
    "read_config",
    "read_params",
]
