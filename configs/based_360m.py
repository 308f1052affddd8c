"""Based at 360M (arXiv 2402.18668): 17 gated short convolutions, 5 Taylor linear attentions, 5 sliding windows.

    engrax train based_360m --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/based_360m

The layers stand as in the released model: linear attention at 1, 6, 11, 16 and 21, a window of 256 tokens after each,
convolutions elsewhere; the pattern repeats once, so that all 27 layers are compiled. 363 M parameters, 10 B tokens; not
trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import AttentionConfig, BasedConfig, GatedConvolutionConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    convolution = GatedConvolutionConfig(expand=2, conv_width=3)
    linear = BasedConfig(heads=16, head_dim=16, value_dim=64, chunk_size=64)
    window = AttentionConfig(heads=16, head_dim=64, window=256)
    mixers = [convolution] * 27
    for layer in (1, 6, 11, 16, 21):
        mixers[layer], mixers[layer + 1] = linear, window
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=50_264,
            dim=1024,
            mixers=tuple(mixers),
            repeat=1,
            mlp_hidden=2048,
            remat="dots",
        ),
        data=TextFolder(path="corpus", seq_len=2048),
        steps=20_000,
        batch_size=256,
        optimizer=AdamWConfig(learning_rate=8e-4, weight_decay=0.1, schedule=CosineConfig(warmup_steps=200)),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
