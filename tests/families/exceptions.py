"""What the rules for all classes do not know about some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

BATCH, LENGTH = 2, 40
ROPE = {"rope_type": "default", "rope_theta": 1e4}

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}

# Fields by the name of a configuration's class.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "BltPatcherConfig": {"vocab_size": 1031},
    "BridgeTowerConfig": {"hidden_size": 64},
    "BridgeTowerTextConfig": {"hidden_size": 64},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 900}},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            name: ROPE | {"mrope_section": [2, 1, 1]} for name in ("sliding_attention", "full_attention")
        },
    },
    "Cosmos3EdgeTextConfig": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "DeepseekOcr2TextConfig": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "BailingHybridConfig": {"num_local_experts": 32, "num_experts_per_tok": 2},
    "Blip2Config": {"image_token_index": 900},
    "InstructBlipConfig": {"image_token_index": 900},
    "InstructBlipVideoConfig": {"video_token_index": 900},
    "MobileBertConfig": {"embedding_size": 16},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "Step3p7TextConfig": {"sliding_window": 8},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32},
    "Dots1Config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "Emu3Config": {"vocabulary_map": {"<image>": 900}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "GlmImageTextConfig": {"vision_vocab_size": 1021},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"intermediate_size": [64, 64]},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "index_topk": 16},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [],
        "spatial_target_layers": [0, 0, 0, 0],
        "downsample_rate": "1/2",
        "vision_config": SIGLIP,
    },
    "KimiLinearConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Kosmos2Config": {"latent_query_num": 8},
    "LEDConfig": {"attention_window": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongformerConfig": {"attention_window": [8, 8]},
    "LongcatFlashConfig": {"qk_head_dim": 16},
    "Mamba2Config": {"head_dim": 16},
    "MimiConfig": {"upsample_groups": 32},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "Molmo2VisionConfig": {"image_size": [16, 16]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": [32, 32, 32, 32]},
    "NeoMMEConfig": {"head_dim": 16},
    "PaddleOCRTextConfig": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "PerceiverConfig": {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "ReformerConfig": {
        "axial_pos_shape": [8, 5],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
    },
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "ZambaConfig": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}

# Fields by the name of a model's class.
OF_MODELS: dict[str, dict[str, Any]] = {
    "ReformerModelWithLMHead": {"is_decoder": True},
}

# Classes whose loss is no cross-entropy over words, with what they are trained by.
HEADLESS = {
    "ElectraForPreTraining": "which tokens were replaced",
    "FunnelForPreTraining": "which tokens were replaced",
    "HieraForPreTraining": "masked patches of images",
    "ClvpModelForConditionalGeneration": "pairs of text and speech",
    "GradiumPhononTTSForConditionalGeneration": "flows of speech",
    "PocketTTSForConditionalGeneration": "flows of speech",
    "PI0ForConditionalGeneration": "actions of a robot",
    "Qwen2_5OmniForConditionalGeneration": "its parts",
    "Qwen2_5OmniPreTrainedModelForConditionalGeneration": "nothing: it has no forward",
    "Qwen3OmniMoeForConditionalGeneration": "its parts",
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "nothing: it has no forward",
    "SplinterForPreTraining": "spans of answers",
    "UniSpeechForPreTraining": "contrasts of speech",
    "UniSpeechSatForPreTraining": "contrasts of speech",
    "ViTMAEForPreTraining": "masked patches of images",
    "VideoMAEForPreTraining": "masked patches of videos",
    "Wav2Vec2ConformerForPreTraining": "contrasts of speech",
    "Wav2Vec2ForPreTraining": "contrasts of speech",
}

# Why other classes are not lazy, or not built.
REASONS = {
    "ChameleonForConditionalGeneration": "it masks the words of images",
    "CsmDepthDecoderForCausalLM": "the logits are products with a parameter for each codebook",
    "CsmForConditionalGeneration": "the depth decoder's are products with a parameter for each codebook",
    "DiaForConditionalGeneration": "one layer has the words of all channels",
    "Dots3NoteForConditionalGeneration": "its configuration fixes settings of 42 layers",
    "FlavaForPreTraining": "of its four heads one has to be named",
    "IdeficsForVisionText2Text": "it has two weights",
    "MobileBertForMaskedLM": "a product with two weights joined",
    "MobileBertForPreTraining": "a product with two weights joined",
    "PerceiverForMaskedLM": "the logits are a product with the embedding's weight",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "it has a head for each codebook",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "it takes what another model has made",
    "RagSequenceForGeneration": "its loss is over documents",
    "RagTokenForGeneration": "its loss is over documents",
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), "it takes keys and values of another model"
    ),
    **dict.fromkeys(
        [f"{name}ForConditionalGeneration" for name in ("FastVlm", "Gemma3n", "PerceptionLM")],
        "it needs timm, which is not installed",
    ),
    **dict.fromkeys(
        [
            f"{name}For{kind}"
            for name in ("Musicgen", "MusicgenMelody")
            for kind in ("CausalLM", "ConditionalGeneration")
        ],
        "it has a head for each codebook",
    ),
}


def image(side: int = 16) -> Tensor:
    return torch.rand(BATCH, 3, side, side)


def ids(*shape: int, most: int = 500) -> Tensor:
    return torch.randint(10, most, shape or (BATCH, LENGTH))


def labels() -> Tensor:
    return ids().index_fill(1, torch.arange(7), -100)


def speech(config: PreTrainedConfig) -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)}


def documents(config: PreTrainedConfig) -> dict[str, Tensor]:
    """What a retriever finds."""
    number = BATCH * config.n_docs
    found = {
        "labels": ids(),
        "context_input_ids": ids(number, LENGTH),
        "context_attention_mask": torch.ones(number, LENGTH),
    }
    return found | {"doc_scores": torch.randn(BATCH, config.n_docs)}


def codes(config: PreTrainedConfig) -> dict[str, Tensor]:
    return {"input_ids": ids(4 * BATCH, LENGTH), "labels": ids(BATCH, LENGTH, 4)}


# What the forward of a class needs besides ids and labels, or instead of them.
BATCHES: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "AlbertForPreTraining": lambda _: {"sentence_order_label": torch.tensor([0, 1])},
    "Blip2ForConditionalGeneration": lambda c: {"pixel_values": image(), "input_ids": with_images(c)},
    "BlipForConditionalGeneration": lambda _: {"pixel_values": image()},
    "BridgeTowerForMaskedLM": lambda c: {"pixel_values": image(c.vision_config.image_size)},
    "DiaForConditionalGeneration": lambda c: {
        "input_ids": ids(most=200),
        "decoder_input_ids": ids(BATCH, LENGTH, c.decoder_config.num_channels),
        "labels": ids(BATCH * c.decoder_config.num_channels, LENGTH),
    },
    "CsmForConditionalGeneration": lambda c: {
        "input_ids": ids(BATCH, LENGTH, c.num_codebooks),
        "labels": ids(BATCH, LENGTH, c.num_codebooks),
    },
    "KyutaiSpeechToTextForConditionalGeneration": lambda c: {"input_ids": ids(BATCH, LENGTH, c.num_codebooks + 1)},
    "Kosmos2ForConditionalGeneration": lambda c: {
        "pixel_values": image(c.vision_config.image_size),
        "image_embeds_position_mask": (torch.arange(LENGTH) < c.latent_query_num).expand(BATCH, LENGTH).long(),
    },
    "SeamlessM4TTextToUnitForConditionalGeneration": lambda c: {
        "input_ids": None,
        "inputs_embeds": torch.randn(BATCH, LENGTH, 32),
    },
    "CanaryForConditionalGeneration": lambda c: {
        "input_features": torch.randn(BATCH, 64, c.encoder_config.num_mel_bins)
    },
    "CohereAsrForConditionalGeneration": lambda c: {
        "input_features": torch.randn(BATCH, 64, c.encoder_config.num_mel_bins)
    },
    "CsmDepthDecoderForCausalLM": lambda _: {"input_ids": ids(BATCH, 32), "labels": ids(BATCH, 32)},
    "FlavaForPreTraining": lambda _: {"input_ids_masked": ids(), "mlm_labels": labels(), "return_loss": True},
    "GitForCausalLM": lambda _: {"pixel_values": image()},
    "InstructBlipForConditionalGeneration": lambda c: {
        "pixel_values": image(),
        "qformer_input_ids": ids(),
        "input_ids": with_images(c),
    },
    "InstructBlipVideoForConditionalGeneration": lambda c: {
        "pixel_values": torch.rand(BATCH, 2, 3, 16, 16),
        "qformer_input_ids": ids(),
        "input_ids": with_images(c),
    },
    "LxmertForPreTraining": lambda c: {
        "visual_feats": torch.randn(BATCH, 4, c.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 4, 4),
    },
    "Molmo2ForConditionalGeneration": lambda _: {"mm_token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)},
    "MoonshineForConditionalGeneration": lambda _: {"input_values": torch.randn(BATCH, 8000)},
    "MoonshineStreamingForConditionalGeneration": lambda _: {"input_values": torch.randn(BATCH, 8000)},
    "MusicgenForCausalLM": codes,
    "MusicgenMelodyForCausalLM": codes,
    "MusicgenForConditionalGeneration": lambda _: {"labels": ids(BATCH, LENGTH, 4)},
    "MusicgenMelodyForConditionalGeneration": lambda _: {"labels": ids(BATCH, LENGTH, 4)},
    "IdeficsForVisionText2Text": lambda c: {
        "pixel_values": torch.rand(BATCH, 1, 3, 16, 16),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1),
    },
    "PerceiverForMaskedLM": lambda _: {"inputs": ids(BATCH, 128), "input_ids": None, "labels": ids(BATCH, 128)},
    "SeamlessM4TForSpeechToText": lambda _: {"input_features": torch.randn(BATCH, 64, 32)},
    "SeamlessM4Tv2ForSpeechToText": lambda _: {"input_features": torch.randn(BATCH, 64, 32)},
    "MoshiForConditionalGeneration": lambda _: {
        "moshi_audio_codes": ids(BATCH, 8, LENGTH),
        "user_audio_codes": ids(BATCH, 8, LENGTH),
        "text_labels": ids(),
    },
    "Qwen2_5OmniTalkerForConditionalGeneration": lambda _: {
        "thinker_reply_part": torch.randn(BATCH, LENGTH, 32),
        "input_text_ids": ids(),
    },
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": lambda _: {"generation_steps": 1},
    "RagSequenceForGeneration": documents,
    "RagTokenForGeneration": documents,
    "SpeechEncoderDecoderModel": lambda _: {"input_values": torch.randn(BATCH, 8000)},
    "SpeechT5ForSpeechToText": lambda _: {"input_values": torch.randn(BATCH, 8000)},
    "VisionEncoderDecoderModel": lambda c: {"pixel_values": image(c.encoder.image_size)},
    "PPFormulaNetForConditionalGeneration": lambda c: {"pixel_values": image(c.vision_config.image_size)},
    "Pix2StructForConditionalGeneration": lambda c: {
        "flattened_patches": torch.rand(BATCH, 8, 2 + c.vision_config.patch_embed_hidden_size)
    },
    "Speech2TextForConditionalGeneration": lambda c: {
        "input_features": torch.randn(BATCH, 64, c.input_feat_per_channel)
    },
    "UdopForConditionalGeneration": lambda _: {"bbox": torch.rand(BATCH, LENGTH, 4)},
    "ViltForMaskedLM": lambda _: {"pixel_values": image()},
    "VisualBertForPreTraining": lambda c: {
        "visual_embeds": torch.randn(BATCH, 4, c.visual_embedding_dim),
        "visual_attention_mask": torch.ones(BATCH, 4),
        "attention_mask": torch.ones(BATCH, LENGTH),
        "labels": ids(BATCH, LENGTH + 4),
    },
    "VoxtralRealtimeForConditionalGeneration": lambda c: {
        "input_features": torch.randn(BATCH, c.audio_config.num_mel_bins, 8 * LENGTH)
    },
    "WhisperForConditionalGeneration": speech,
    **{
        f"{name}ForPreTraining": lambda _: {"next_sentence_label": torch.tensor([0, 1])}
        for name in ("Bert", "Ernie", "FNet", "MegatronBert", "MobileBert")
    },
}


def with_images(config: PreTrainedConfig) -> Tensor:
    """Ids that start with the places of an image."""
    found = ids()
    found[:, : config.num_query_tokens] = 900
    return found
