"""Small models with the architecture of Nucleotide Transformer, version 1, and random weights.

Input: width, layers, heads. Output: a configuration, or a model folder in the Hugging Face format.
Invariants: the same seed gives the same weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..reads.tokens import CLS_ID, MASK_ID, PAD_ID, VOCABULARY, save_tokenizer

if TYPE_CHECKING:
    from transformers import EsmConfig, EsmForMaskedLM

_MAX_TOKENS = 1000


def esm_config(hidden: int, layers: int, heads: int) -> "EsmConfig":
    """Configuration of an ESM model like Nucleotide Transformer, version 1."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=_MAX_TOKENS + PAD_ID + 1,
        position_embedding_type="absolute",
        token_dropout=True,
        mask_token_id=MASK_ID,
        pad_token_id=PAD_ID,
        bos_token_id=CLS_ID,
        emb_layer_norm_before=False,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        tie_word_embeddings=False,
        layer_norm_eps=1e-12,
    )


def new_model(hidden: int, layers: int, heads: int, seed: int) -> "EsmForMaskedLM":
    """A model with random weights; they follow from the seed."""
    import torch
    from transformers import EsmForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EsmForMaskedLM(esm_config(hidden, layers, heads))
        # Untrained positions would only add noise to the 6-mers.
        torch.nn.init.normal_(model.esm.embeddings.position_embeddings.weight, std=0.002)
    return model


def write_model(
    folder: str | Path, hidden: int = 128, layers: int = 2, heads: int = 4, seed: int = 0
) -> None:
    """Write a small model with random weights in the Hugging Face format.

    The architecture is Nucleotide Transformer's, version 1: ESM, learned absolute positions, token
    dropout, an untied masked-language-model head.
    """
    from .model import no_bars
    from .model_files import share_weights

    model = new_model(hidden, layers, heads, seed)
    with no_bars():
        model.save_pretrained(folder)
    share_weights(Path(folder))
    save_tokenizer(folder)
