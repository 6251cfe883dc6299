"""Where Megatron looks for the fused layer norm."""
