"""Data sets: text and generated memory tasks with one contract (`DataConfig`), registered by name in `DATASETS`."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.data.associative_retrieval import AssociativeRetrieval
    from engrax.data.babilong import Babilong
    from engrax.data.bit_patterns import BitPatterns
    from engrax.data.common_words import CommonWords
    from engrax.data.compositional_mqar import CompositionalMQAR
    from engrax.data.compression import Compression
    from engrax.data.config import DATASETS, Batch, DataConfig, Loader
    from engrax.data.continual import Continual
    from engrax.data.counters import Counters
    from engrax.data.curriculum import Curriculum
    from engrax.data.digits import load_digits
    from engrax.data.dyck import Dyck
    from engrax.data.forgetting_mqar import ForgettingMQAR
    from engrax.data.frequent_words import FrequentWords
    from engrax.data.fuzzy_in_context_recall import FuzzyInContextRecall
    from engrax.data.in_context_recall import InContextRecall
    from engrax.data.induction import Induction
    from engrax.data.key_values import KeyValues
    from engrax.data.knights_and_knaves import KnightsAndKnaves
    from engrax.data.latch import Latch
    from engrax.data.memorization import Memorization
    from engrax.data.mixture import Mixture
    from engrax.data.mqar import MQAR
    from engrax.data.niah import (
        NiahMultikey1,
        NiahMultikey2,
        NiahMultikey3,
        NiahMultiquery,
        NiahMultivalue,
        NiahSingle1,
        NiahSingle2,
        NiahSingle3,
    )
    from engrax.data.noisy_in_context_recall import NoisyInContextRecall
    from engrax.data.palindrome import Palindrome
    from engrax.data.parity import Parity
    from engrax.data.passkey import Passkey
    from engrax.data.recall_window import RecallWindow
    from engrax.data.segment_order import SegmentOrder
    from engrax.data.selective_copying import SelectiveCopying
    from engrax.data.set_disjointness import SetDisjointness
    from engrax.data.shuffle import Shuffle
    from engrax.data.stack import Stack
    from engrax.data.stdlib_text import StdlibText
    from engrax.data.task_mixture import TaskMixture
    from engrax.data.text_folder import TextFolder
    from engrax.data.tfds_text import TfdsText
    from engrax.data.tokenizers import ByteTokenizer, JsonTokenizer
    from engrax.data.variable_tracking import VariableTracking

__all__ = [
    "DATASETS",
    "MQAR",
    "AssociativeRetrieval",
    "Babilong",
    "Batch",
    "BitPatterns",
    "ByteTokenizer",
    "CommonWords",
    "CompositionalMQAR",
    "Compression",
    "Continual",
    "Counters",
    "Curriculum",
    "DataConfig",
    "Dyck",
    "ForgettingMQAR",
    "FrequentWords",
    "FuzzyInContextRecall",
    "InContextRecall",
    "Induction",
    "JsonTokenizer",
    "KeyValues",
    "KnightsAndKnaves",
    "Latch",
    "Loader",
    "Memorization",
    "Mixture",
    "NiahMultikey1",
    "NiahMultikey2",
    "NiahMultikey3",
    "NiahMultiquery",
    "NiahMultivalue",
    "NiahSingle1",
    "NiahSingle2",
    "NiahSingle3",
    "NoisyInContextRecall",
    "Palindrome",
    "Parity",
    "Passkey",
    "RecallWindow",
    "SegmentOrder",
    "SelectiveCopying",
    "SetDisjointness",
    "Shuffle",
    "Stack",
    "StdlibText",
    "TaskMixture",
    "TextFolder",
    "TfdsText",
    "VariableTracking",
    "load_digits",
]

__getattr__ = lazy.attach(__name__)
