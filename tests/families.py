"""Every family of models that this project was tried on: a small random config, and where its projections are.

The paths are written down by hand, from the families' own source: they are what the search by structure must find.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

CONTEXT = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}

# Layouts of a few families changed between the versions 4 and 5 of transformers; both are in use.
NEW = int(version("transformers").split(".")[0]) >= 5
VIT_ATTENTION, VIT_MLP = ("attention.o_proj", "mlp.fc2") if NEW else ("attention.output.dense", "output.dense")

Where = tuple[str, int]  # path of a projection, and its width


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        kind: which of ablation_sweeps/models loads it; `backbone` where there is no head to score, and so no loader.
        name: class of transformers, or model of timm.
        attention: the projections in the order in which they are called, each with its width.
        mlp: likewise; None where there is no such projection (experts that are not modules).
        heads: query heads of each layer.
        hybrid: some layers have no such projection, and are left alone.
        heads_apart: nothing mixes the heads between attention and projection; False where a norm does.
    """

    kind: Literal["causal_lm", "masked_lm", "image_classifier", "timm", "backbone"]
    name: str
    options: dict[str, Any]
    attention: list[Where]
    mlp: list[Where] | None
    heads: tuple[int, ...] = (4, 4, 4)
    hybrid: bool = False
    heads_apart: bool = True

    @property
    def exists(self) -> bool:
        import transformers

        return self.kind == "timm" or hasattr(transformers, self.name)


def each(path: str, width: int, layers: tuple[int, ...] = (0, 1, 2)) -> list[Where]:
    return [(path.format(layer), width) for layer in layers]


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": CONTEXT, **IDS}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}  # heads x head_dim is twice the hidden size, as in Gemma and Qwen3
ENCODER = {**SMALL, "bos_token_id": None, "eos_token_id": None}
GPT = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, **IDS}
PICTURES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 16, "patch_size": 8}  # fmt: skip
CLASSES = {**PICTURES, "num_labels": 5}
TEXT_TOWER = {key: SMALL[key] for key in SMALL if key not in IDS} | IDS
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def llama_like(name: str, options: dict[str, Any], width: int = 32) -> Family:
    return Family("causal_lm", name, options, each("model.layers.{}.self_attn.o_proj", width),
                  each("model.layers.{}.mlp.down_proj", 48))  # fmt: skip


def bert_like(name: str, options: dict[str, Any], base: str) -> Family:
    return Family("masked_lm", name, options, each(base + ".encoder.layer.{}.attention.output.dense", 32),
                  each(base + ".encoder.layer.{}.output.dense", 48))  # fmt: skip


def vit_like(name: str, options: dict[str, Any], base: str) -> Family:
    layers = base + (".layers.{}." if NEW else ".encoder.layer.{}.")
    return Family("image_classifier", name, options, each(layers + VIT_ATTENTION, 32), each(layers + VIT_MLP, 48))


def dinov2_like(name: str, base: str) -> Family:
    layers = base + ".encoder.layer.{}."
    return Family("image_classifier", name, {**CLASSES, "mlp_ratio": 2}, each(layers + VIT_ATTENTION, 32),
                  each(layers + "mlp.fc2", 64))  # fmt: skip


def clip_like(name: str) -> Family:
    options = {"vision_config": PICTURES, "text_config": TEXT_TOWER, "num_labels": 5}
    return Family("image_classifier", name, options, each("vision_model.encoder.layers.{}.self_attn.out_proj", 32),
                  each("vision_model.encoder.layers.{}.mlp.fc2", 48))  # fmt: skip


def timm_like(name: str, width: int = 128, heads_apart: bool = True, **options: Any) -> Family:
    return Family("timm", name, {**TIMM, **options}, each("blocks.{}.attn.proj", 32), each("blocks.{}.mlp.fc2", width),
                  heads_apart=heads_apart)  # fmt: skip


def with_pictures(name: str, text: dict[str, Any], vision: dict[str, Any], width: int = 32) -> Family:
    """A model of text and pictures, whose tower for pictures has projections of the same name."""
    options = {"text_config": text, "vision_config": {**PICTURES, **vision}, "image_token_index": 4}
    return Family("causal_lm", name, options, each("model.language_model.layers.{}.self_attn.o_proj", width),
                  each("model.language_model.layers.{}.mlp.down_proj", 48))  # fmt: skip


def staged(path: str, widths: tuple[int, int]) -> list[Where]:
    """Two stages of two layers each."""
    return [(path.format(stage, block), width) for stage, width in enumerate(widths) for block in (0, 1)]


FAMILIES = {
    "gpt2": Family("causal_lm", "GPT2LMHeadModel", GPT, each("transformer.h.{}.attn.c_proj", 32),
                   each("transformer.h.{}.mlp.c_proj", 128)),
    "gpt_bigcode": Family("causal_lm", "GPTBigCodeForCausalLM", GPT, each("transformer.h.{}.attn.c_proj", 32),
                          each("transformer.h.{}.mlp.c_proj", 128)),
    "gpt_neo": Family("causal_lm", "GPTNeoForCausalLM",
                      {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_layers": 3, "num_heads": 4, **IDS,
                       "max_position_embeddings": CONTEXT, "attention_types": [[["global", "local", "global"], 1]],
                       "window_size": 6, "intermediate_size": 48},
                      each("transformer.h.{}.attn.attention.out_proj", 32), each("transformer.h.{}.mlp.c_proj", 48)),
    "gptj": Family("causal_lm", "GPTJForCausalLM", {**GPT, "rotary_dim": 4, "n_inner": 48},
                   each("transformer.h.{}.attn.out_proj", 32), each("transformer.h.{}.mlp.fc_out", 48)),
    "opt": Family("causal_lm", "OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
                  each("model.decoder.layers.{}.self_attn.out_proj", 32), each("model.decoder.layers.{}.fc2", 48)),
    "gpt_neox": Family("causal_lm", "GPTNeoXForCausalLM", SMALL, each("gpt_neox.layers.{}.attention.dense", 32),
                       each("gpt_neox.layers.{}.mlp.dense_4h_to_h", 48)),
    "llama": llama_like("LlamaForCausalLM", GROUPED),
    "mistral": llama_like("MistralForCausalLM", GROUPED),
    "qwen2": llama_like("Qwen2ForCausalLM", GROUPED),
    "qwen3": llama_like("Qwen3ForCausalLM", WIDE, 64),
    "smollm3": llama_like("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layer_interval": 2}),
    "gemma": llama_like("GemmaForCausalLM", WIDE, 64),
    "gemma2": llama_like("Gemma2ForCausalLM", {**WIDE, "sliding_window": 6}, 64),
    "gemma3": llama_like("Gemma3ForCausalLM", {**WIDE, "sliding_window": 6}, 64),
    "gemma3n": llama_like("Gemma3nForCausalLM",
                          {**WIDE, "vocab_size_per_layer_input": len(VOCABULARY), "hidden_size_per_layer_input": 8,
                           "num_kv_shared_layers": 1, "laurel_rank": 4, "sliding_window": 6, "altup_num_inputs": 2,
                           "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                           "activation_sparsity_pattern": [0.5, 0.0, 0.0]}, 64),
    "phi3": llama_like("Phi3ForCausalLM", {**GROUPED, "original_max_position_embeddings": CONTEXT}),
    "olmo2": llama_like("Olmo2ForCausalLM", GROUPED),
    "cohere": llama_like("CohereForCausalLM", GROUPED),
    "granite": llama_like("GraniteForCausalLM", GROUPED),
    "stablelm": llama_like("StableLmForCausalLM", GROUPED),
    "starcoder2": Family("causal_lm", "Starcoder2ForCausalLM", GROUPED, each("model.layers.{}.self_attn.o_proj", 32),
                         each("model.layers.{}.mlp.c_proj", 48)),
    "mixtral": Family("causal_lm", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 3},
                      each("model.layers.{}.self_attn.o_proj", 32), None),
    "gpt_oss": Family("causal_lm", "GptOssForCausalLM",
                      {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6},
                      each("model.layers.{}.self_attn.o_proj", 64), None),
    "qwen3_next": Family("causal_lm", "Qwen3NextForCausalLM",
                         {**WIDE, "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 2,
                          "layer_types": ["linear_attention", "full_attention"] * 2, "moe_intermediate_size": 16,
                          "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                          "linear_num_key_heads": 2, "linear_num_value_heads": 4},
                         each("model.layers.{}.self_attn.o_proj", 64, (1, 3)), None, heads=(4, 4), hybrid=True),
    "phi": Family("causal_lm", "PhiForCausalLM", GROUPED, each("model.layers.{}.self_attn.dense", 32),
                  each("model.layers.{}.mlp.fc2", 48)),
    "falcon": Family("causal_lm", "FalconForCausalLM", {**SMALL, "multi_query": True, "ffn_hidden_size": 48},
                     each("transformer.h.{}.self_attention.dense", 32), each("transformer.h.{}.mlp.dense_4h_to_h", 48)),
    "falcon_grouped": Family("causal_lm", "FalconForCausalLM",
                             {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
                             each("transformer.h.{}.self_attention.dense", 32),
                             each("transformer.h.{}.mlp.dense_4h_to_h", 48)),
    "falcon_alibi": Family("causal_lm", "FalconForCausalLM",
                           {**SMALL, "multi_query": False, "alibi": True, "ffn_hidden_size": 48},
                           each("transformer.h.{}.self_attention.dense", 32),
                           each("transformer.h.{}.mlp.dense_4h_to_h", 48)),
    "bloom": Family("causal_lm", "BloomForCausalLM",
                    {"vocab_size": len(VOCABULARY), "hidden_size": 32, "n_layer": 3, "n_head": 4, **IDS},
                    each("transformer.h.{}.self_attention.dense", 32),
                    each("transformer.h.{}.mlp.dense_4h_to_h", 128)),
    "mpt": Family("causal_lm", "MptForCausalLM",
                  {"vocab_size": len(VOCABULARY), "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT,
                   **IDS},
                  each("transformer.blocks.{}.attn.out_proj", 32), each("transformer.blocks.{}.ffn.down_proj", 128)),
    "bert": bert_like("BertForMaskedLM", ENCODER, "bert"),
    "roberta": bert_like("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": CONTEXT + 1}, "roberta"),
    "electra": bert_like("ElectraForMaskedLM", {**ENCODER, "embedding_size": 16}, "electra"),
    "deberta": bert_like("DebertaForMaskedLM",
                         {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0,
                          "position_biased_input": False}, "deberta"),
    "deberta_v2": bert_like("DebertaV2ForMaskedLM",
                            {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                             "type_vocab_size": 0, "position_biased_input": False, "position_buckets": 8,
                             "share_att_key": True}, "deberta"),
    "distilbert": Family("masked_lm", "DistilBertForMaskedLM",
                         {"vocab_size": len(VOCABULARY), "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
                          "max_position_embeddings": CONTEXT, "pad_token_id": 0},
                         each("distilbert.transformer.layer.{}.attention.out_lin", 32),
                         each("distilbert.transformer.layer.{}.ffn.lin2", 48)),
    "modernbert": Family("masked_lm", "ModernBertForMaskedLM",
                         {**SMALL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
                         each("model.layers.{}.attn.Wo", 32), each("model.layers.{}.mlp.Wo", 48)),
    "albert": Family("masked_lm", "AlbertForMaskedLM", {**SMALL, "embedding_size": 16},
                     each("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense", 32),
                     each("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output", 48)),
    "vit": vit_like("ViTForImageClassification", CLASSES, "vit"),
    "deit": vit_like("DeiTForImageClassification", CLASSES, "deit"),
    "beit": vit_like("BeitForImageClassification", CLASSES, "beit"),
    "dinov2": dinov2_like("Dinov2ForImageClassification", "dinov2"),
    "dinov2_registers": dinov2_like("Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),
    "swin": Family("image_classifier", "SwinForImageClassification",
                   {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2],
                    "num_heads": [2, 4], "num_labels": 5},
                   staged("swin.encoder.layers.{}.blocks.{}." + VIT_ATTENTION, (16, 32)),
                   staged("swin.encoder.layers.{}.blocks.{}." + VIT_MLP, (64, 128)), heads=(2, 2, 4, 4)),
    "dinov3": Family("backbone", "DINOv3ViTModel", PICTURES,
                     each(("model." if NEW else "") + "layer.{}.attention.o_proj", 32),
                     each(("model." if NEW else "") + "layer.{}.mlp.down_proj", 48)),
    "llava": with_pictures("LlavaForConditionalGeneration", {**GROUPED, "model_type": "llama"},
                           {"model_type": "clip_vision_model"}),
    "gemma3_pictures": with_pictures("Gemma3ForConditionalGeneration", {**WIDE, "sliding_window": 6}, {}, 64),
    "clip": clip_like("CLIPForImageClassification"),
    "siglip": clip_like("SiglipForImageClassification"),
    "timm_vit": timm_like("vit_tiny_patch16_224"),
    "timm_deit": timm_like("deit_tiny_distilled_patch16_224"),
    "timm_eva": timm_like("eva02_tiny_patch14_224", 85),
    "timm_eva_norm": timm_like("eva02_base_patch14_224", 85, heads_apart=False, scale_attn_inner=True),
    "timm_dinov3": timm_like("vit_small_patch16_dinov3"),
    "timm_beit": timm_like("beit_base_patch16_224"),
    "timm_naflex": timm_like("naflexvit_base_patch16_gap"),
    "timm_swin": Family("timm", "swin_tiny_patch4_window7_224",
                        {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2],
                         "num_heads": [2, 4]},
                        staged("layers.{}.blocks.{}.attn.proj", (16, 32)),
                        staged("layers.{}.blocks.{}.mlp.fc2", (64, 128)), heads=(2, 2, 4, 4)),
}  # fmt: skip
