"""The student of the study: narrower than the teacher that lies beside this file, and with less to do per token that it
writes, since that is where a translator spends its time."""

from pathlib import Path

import torch
from transformers import MarianConfig, MarianMTModel

TEACHER = Path(__file__).parent / "teacher"


def build() -> MarianMTModel:
    """Random weights, but for the embeddings: they are the teacher's, as well as fewer dimensions can hold them."""
    config = MarianConfig.from_pretrained(TEACHER)
    config.d_model = config.d_model * 5 // 8
    config.encoder_ffn_dim //= 2
    config.decoder_ffn_dim //= 2
    # Kim et al. 2019, Kasai et al. 2020: deep encoders with shallow decoders write as well, and faster.
    config.decoder_layers = max(1, config.decoder_layers // 3)
    # A small network on little data has less to unlearn.
    config.dropout /= 2
    torch.manual_seed(0)
    student = MarianMTModel(config)
    table = MarianMTModel.from_pretrained(TEACHER).get_input_embeddings().weight.detach()
    # Eckart and Young 1936: no other projection keeps more of the products of embeddings, which tell words apart.
    _, _, directions = torch.linalg.svd(table, full_matrices=False)
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(table @ directions[: config.d_model].T)
    return student.eval()
