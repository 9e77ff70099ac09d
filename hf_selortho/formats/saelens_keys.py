"""The keys of cfg.json of SAELens, all versions, and of the arguments with which it loads a language model."""

from __future__ import annotations

from typing import Any

from .keys import Content, KeyTable, Refusal, unless

_SITE = "the commands here read whole outputs of decoder layers; choose an SAE of hook_resid_post or hook_resid_pre"
_OTHER_WEIGHTS = "the SAE is for a language model of other weights than those on the Hub; choose another SAE"


def _normalization(value: Any, _content: Content) -> str | None:
    if value in (None, False, "none"):
        return None
    if value in ("layer_norm", "constant_norm_rescale"):
        return "each token is normalised by its own norm, which no weights can say; choose an SAE with 'none'"
    return (
        "it is no part of the weights; fold it into them with SAELens and save the SAE again with "
        "normalize_activations='none'"
    )


def _same_as(*keys: str) -> Refusal:
    """Refuse an output of another site or width than the input, which one of the keys says."""

    def refuse(value: Any, content: Content) -> str | None:
        same = value is None or any(value == content.get(key) for key in keys)
        return None if same else "it is a transcoder, which predicts another activation than it reads; choose an SAE"

    return refuse


def _positions(value: Any, content: Content) -> str | None:
    """Refuse slices of positions, but for those of the whole context, or of all but BOS, which is left out anyway."""
    length = content.get("context_size")
    length = length if type(length) is int and 0 < length < 1 << 31 else 1 << 10
    try:
        positions = range(length)[slice(*([None] if value is None else value))]
    except (TypeError, ValueError):
        positions = range(0)
    whole = positions == range(length) or (positions == range(1, length) and content.get("prepend_bos", True) is True)
    return None if whole else "it was trained on some positions of a context only; choose one of all, [null]"


LANGUAGE_MODEL = KeyTable(
    obeyed=frozenset({"center_writing_weights", "revision", "checkpoint_value"}),
    # The first line: LayerNorm's gains, biases and the unembedding are moved to where the residual stream is as before.
    meaningless=frozenset(
        "fold_ln center_unembed fold_value_biases refactor_factored_attn_matrices "
        "device n_devices move_to_device device_map max_memory low_cpu_mem_usage offload_folder dtype torch_dtype "
        "attn_implementation use_cache use_safetensors default_prepend_bos default_padding_side first_n_layers n_ctx "
        "trust_remote_code token use_auth_token cache_dir local_files_only force_download".split()
    ),
    refused={
        **dict.fromkeys(
            ("checkpoint_index", "checkpoint_label", "hf_model", "tokenizer", "variant", "subfolder", "gguf_file",
             "quantization_config"),
            unless(None, "", reason=_OTHER_WEIGHTS),
        ),
        **dict.fromkeys(("load_in_8bit", "load_in_4bit"), unless(None, False, reason=_OTHER_WEIGHTS)),
    },
)  # fmt: skip

METADATA = KeyTable(
    obeyed=frozenset(
        "model_name hf_model_name hf_model_revision hook_name hook_point hf_hook_name context_size prepend_bos "
        "dataset_path model_from_pretrained_kwargs".split()
    ),
    # Special tokens are left out here whatever the training did.
    meaningless=frozenset(
        "sae_lens_version sae_lens_training_version model_class_name exclude_special_tokens neuronpedia_id l0 "
        "hook_layer hook_point_layer dataset_trust_remote_code training_architecture training_architecture_details "
        "sequence_separator_token disable_concat_sequences".split()
    ),
    refused={
        "hook_head_index": unless(None, reason=f"it reads one attention head; {_SITE}"),
        "hook_point_head_index": unless(None, reason=f"it reads one attention head; {_SITE}"),
        "hook_head_index_out": unless(None, reason="it is a transcoder; choose an SAE"),
        "seqpos_slice": _positions,
        "hook_name_out": _same_as("hook_name", "hook_point"),
        "hf_hook_name_out": _same_as("hf_hook_name"),
    },
)

# Before version 6, all was in one object.
CONFIG = KeyTable(
    obeyed=METADATA.obeyed
    | frozenset(
        "architecture d_in d_sae k rescale_acts_by_decoder_norm apply_b_dec_to_input activation_fn activation_fn_str "
        "activation_fn_kwargs metadata".split()
    ),
    # Weights are read as float32; the rest are settings of trainings, whose configs hold them beside those of the SAE.
    meaningless=METADATA.meaningless
    | frozenset(
        "dtype device noise_scale mse_loss_normalization lp_norm l1_coefficient l1_warm_up_steps l0_coefficient "
        "l0_warm_up_steps target_l0 pre_act_loss_coefficient jumprelu_init_threshold jumprelu_bandwidth "
        "jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale aux_loss_coefficient topk_threshold_lr "
        "use_sparse_activations use_matryoshka_aux_loss matryoshka_widths decoder_init_norm decoder_heuristic_init "
        "decoder_heuristic_init_norm init_encoder_as_decoder_transpose b_dec_init_method expansion_factor "
        "normalize_sae_decoder scale_sparsity_penalty_by_decoder_norm use_ghost_grads from_pretrained_path "
        "finetuning_tokens finetuning_method hook_eval is_dataset_tokenized streaming use_chat_formatting "
        "use_cached_activations cached_activations_path n_batches_in_buffer tokens_per_buffer training_tokens "
        "total_training_tokens total_training_steps store_batch_size store_batch_size_prompts train_batch_size "
        "train_batch_size_tokens train_batch_size_prompts activations_mixing_fraction act_store_device llm_device "
        "prefetch_llm_batches seed verbose autocast autocast_lm compile_llm compile_sae llm_compilation_mode "
        "sae_compilation_mode lr lr_end lr_scheduler_name lr_warm_up_steps lr_decay_steps n_restart_cycles adam_beta1 "
        "adam_beta2 feature_sampling_window feature_sampling_method feature_reinit_scale resample_batches "
        "dead_feature_window dead_feature_estimation_method dead_feature_threshold n_eval_batches "
        "eval_batch_size_prompts eval_every_n_wandb_logs logger log_to_wandb log_activations_store_to_wandb "
        "log_optimizer_state_to_wandb log_weights_to_wandb wandb_project wandb_entity wandb_id wandb_log_frequency "
        "run_name checkpoint_path n_checkpoints save_final_checkpoint output_path resume resume_from_checkpoint "
        "model_kwargs sae n_batches_for_norm_estimate".split()
    ),
    refused=METADATA.refused
    | {
        "normalize_activations": _normalization,
        "reshape_activations": unless(None, "", "none", reason=f"it reads the heads of an attention layer; {_SITE}"),
        "finetuning_scaling_factor": unless(
            None, False, reason="its factors are not applied here; choose an SAE without, or save it again with SAELens"
        ),
        "d_out": _same_as("d_in"),
    },
)

# What SAELens knows of published SAEs that their own files do not say: it overrides these. From its registry.
_CENTRED: dict[str, Any] = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
REGISTRY: dict[str, dict[str, Any]] = {
    "jbloom/gpt2-small-saes-reformatted": _CENTRED,
    "jbloom/gpt2-small-feature-splitting-experiment-layer-8": _CENTRED,
    "tommmcgrath/gpt2-small-mlp-out-saes": _CENTRED,
    "joshengels/mistral-7b-residual-stream-saes": {"normalize_activations": "constant_norm_rescale"},
}
