"""Fine-tuning that passes share: fake quantization, the loop, losses, checkpoints."""
