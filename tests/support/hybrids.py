"""Tiny models whose layers carry a state along the tokens, and trees that are hard for them.

A family that is served is a line of `HYBRIDS`; tests/models/test_recurrent.py tries every one.
"""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import torch
import transformers

from dpo_fast.data.batch import collate_trees
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.decoder import decoder_of

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
DELTA = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
KDA = {
    "linear_num_heads": 2, "linear_head_dim": 8, "linear_conv_kernel_dim": 4,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "num_experts": 4, "n_group": 1, "topk_group": 1,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
HYBRIDS = {
    "qwen3-next": ("Qwen3NextConfig", DELTA | EXPERTS | {
        "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "qwen3.5": ("Qwen3_5TextConfig", DELTA),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", DELTA | EXPERTS | {
        "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "olmo-hybrid": ("OlmoHybridConfig", DELTA),
    "kimi-linear": ("KimiLinearConfig", KDA | EXPERTS),
    "bailing-hybrid": ("BailingHybridConfig", KDA | EXPERTS | {"kda_lower_bound": -0.5}),
    "minimax": ("MiniMaxConfig", {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    "nemotron-h": ("NemotronHConfig", EXPERTS | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
        "chunk_size": 16, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24}),
    "bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1]}),
    "granite-hybrid": ("GraniteMoeHybridConfig", MAMBA | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 4, "shared_intermediate_size": 24}),
    "falcon-h1": ("FalconH1Config", MAMBA | {
        "num_hidden_layers": 2, "mamba_d_ssm": 64, "head_dim": 8, "ssm_out_multiplier": 0.7}),
    "zamba2": ("Zamba2Config", {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16,
        "chunk_size": 16, "use_mem_rope": True, "adapter_rank": 4}),
    "mamba2": ("Mamba2Config", {
        "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "lfm2": ("Lfm2Config", CONV),
    "lfm2-moe": ("Lfm2MoeConfig", CONV | EXPERTS | {"num_experts": 4, "num_dense_layers": 1}),
    "lfm3": ("Lfm3Config", {
        "layer_types": ["conv", "full_attention", "conv", "sliding_attention"], "num_hidden_layers": 4,
        "sliding_window": 4, "head_dim": 8}),
}  # fmt: skip
# Those that are told the plan otherwise. A state there is a loop of PyTorch's, so they get shorter trees.
TOLD = {
    "mamba": ("MambaConfig", {"state_size": 8}),
    "falcon-mamba": ("FalconMambaConfig", {"state_size": 8, "num_hidden_layers": 2}),
    "jamba": ("JambaConfig", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8,
        "mamba_dt_rank": 4}),
    "zamba": ("ZambaConfig", {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4}),
    "recurrent-gemma": ("RecurrentGemmaConfig", {
        "lru_width": 32, "attention_window_size": 4, "head_dim": 8}),
    "zaya": ("ZayaConfig", {
        "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "router_hidden_size": 16}),
}  # fmt: skip

# Those that the installed transformers has.
HYBRIDS, TOLD = (
    {name: each for name, each in table.items() if hasattr(transformers, each[0])}
    for table in (HYBRIDS, TOLD)
)


def _ids(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(3, 97) for _ in range(count)]


def _trees() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts shorter than a convolution, branches of one token, three levels, more than a chunk of 64."""
    draw = random.Random(0)
    first, second = _ids(6, draw), _ids(5, draw)
    return [
        ([5], [[8, 9, 2], [10, 2], [2]]),
        ([1, 90], [[11, 2], [12, 13, 14, 15, 44, 2]]),
        # Answers that begin alike twice over, so that a branch is itself continued, and groups of four.
        (
            [4, 4, 3],
            [first + _ids(5, draw), first + second + [7, 2], first + second + [9, 9, 2], [50, 2]],
        ),
        (_ids(70, draw), [_ids(130, draw), _ids(3, draw)]),
    ]


TREES = _trees()


# Attention that chooses its keys (tests/models/test_by_sequence.py).
SPARSE = {
    "deepseek-v3.2": ("DeepseekV32Config", EXPERTS | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "index_n_heads": 8, "index_head_dim": 8, "index_topk": 4}),
}  # fmt: skip


def make(name: str, attention: str = "eager", **sizes):
    """A causal LM in fp32 with weights that let far tokens and every layer matter."""
    config_name, changes = (HYBRIDS | TOLD | SPARSE)[name]
    config = getattr(transformers, config_name)(**(SIZES | changes | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for title, parameter in model.named_parameters():
        if title.endswith(("A_log", "dt_bias")):  # decays of 0.3 to 0.95 a token
            torch.nn.init.uniform_(parameter, -1.5, 0.5)
        elif title.endswith("temp"):  # ZAYA's factor of keys, which begins as zero
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "norm" not in title:
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.1)
    return model.eval()


def in_double(model):
    """The same model in fp64, of its own code with every fp32 in it made fp64.

    Recurrences are written to compute in fp32. With this what two orders of computing differ by is at
    rounding's level of fp64, and a small mistake stands out.
    """
    module = sys.modules[type(model).__module__]
    source = Path(module.__file__).read_text()
    for single, double in (("torch.float32", "torch.float64"), (".float()", ".double()"),
                           ("dtype=torch.float)", "dtype=torch.float64)"),
                           ("dtype=torch.float,", "dtype=torch.float64,")):  # fmt: skip
        source = source.replace(single, double)
    twin = types.ModuleType(f"{module.__name__}_in_double")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(source, module.__file__, "exec"), vars(twin))
    other = vars(twin)[type(model).__name__]._from_config(
        model.config, attn_implementation="eager", experts_implementation="eager"
    )
    other.load_state_dict(model.state_dict())
    other = other.double()
    for module in other.modules():
        if hasattr(module, "decay_factors"):  # MiniMax stores them, rounded to fp32
            factors = module.decay_factors(module.slope_rate)
            for name, value in zip(("query_decay", "key_decay", "diagonal_decay"), factors):
                getattr(module, name).copy_(value)
    return other.eval()


def states(model, layout: str | None) -> torch.Tensor:
    """Hidden states of the rows that predict the completions of `TREES`, [T, D].

    layout: of all sequences in one forward; None: every sequence in a forward of its own.
    """
    decoder = decoder_of(model)
    if layout is None:
        found = []
        for prompt, completions in TREES:
            for completion in completions:
                ids = torch.tensor([prompt + completion[:-1]])
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
                found.append(hidden[len(prompt) - 1 :])
        return torch.cat(found)
    batch = collate_trees(TREES, layout)
    places = {} if batch.spans is None else {"plan": AttentionPlan(batch.spans, CPU)}
    hidden = decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **places,
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.rows_T]
