#!/usr/bin/env python3
"""A small random teacher stored as the hub stores DeepSeek-V4 (FP8 with E8M0 block scales, packed FP4 experts, BF16, F32, I64), and one with a NaN
among its scales. stored_teacher.py GOOD BAD"""
import sys

sys.path.insert(0, "tests/testkit")
import store_v4 as v4  # noqa: E402

CONFIG = dict(
    architectures=["DeepseekV4ForCausalLM"], vocab_size=256, hidden_size=128, num_hidden_layers=5, num_hash_layers=1, num_attention_heads=4, head_dim=128, qk_rope_head_dim=64,
    q_lora_rank=64, o_groups=2, o_lora_rank=48, sliding_window=8, compress_ratios=[0, 4, 16, 4, 16, 0], compress_rope_theta=160000, rope_theta=10000,
    rope_scaling=dict(type="yarn", factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=64), index_n_heads=4, index_head_dim=128, index_topk=12,
    hc_mult=4, hc_sinkhorn_iters=4, hc_eps=1e-6, rms_norm_eps=1e-6, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=96,
    routed_scaling_factor=1.5, swiglu_limit=1.0, quantization_config=dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]), expert_dtype="fp4",
)
weights = v4.random_weights(CONFIG, 5)
weights["layers.2.ffn.experts.3.w1.weight"][:7] *= 2.0**-30
weights["layers.3.attn.wo_b.weight"][:, 64:] *= 2.0**6
stored, _ = v4.convert(weights)
v4.save(sys.argv[1], CONFIG, stored)
name = "layers.3.ffn.experts.2.w2.scale"
dtype, shape, raw = stored[name]
stored[name] = (dtype, shape, raw[:5] + b"\xff" + raw[6:])
v4.save(sys.argv[2], CONFIG, stored)
