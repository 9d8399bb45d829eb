"""Expert types, one file each. `megatron.moe.experts.expert_type` imports them by name."""
