"""The keys of cfg.json of SAELens, all versions, and of the arguments with which it loads a language model."""

from __future__ import annotations

from typing import Any

from .keys import Content, KeyTable, unless

# Read where they are texts.
NAMES = "model_name hf_model_name hf_model_revision hook_point hf_hook_name hf_hook_name_out dataset_path".split()


def _normalization(value: Any, _content: Content) -> str | None:
    if value in (None, False, True, "none", "expected_average_only_in"):
        return None
    if value in ("layer_norm", "constant_norm_rescale"):
        return "each token is normalised by its own norm, which no weights can say; choose an SAE with 'none'"
    return "it is no part of the weights; choose the finished SAE, into whose weights the training has folded it"


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
    obeyed={"center_writing_weights": bool, "revision": str, "checkpoint_value": int},
    # The first line: LayerNorm's gains, biases and the unembedding are moved to where the residual stream is as before.
    meaningless="fold_ln center_unembed fold_value_biases refactor_factored_attn_matrices "
    "device n_devices move_to_device device_map max_memory low_cpu_mem_usage offload_folder dtype torch_dtype "
    "attn_implementation use_cache use_safetensors default_prepend_bos default_padding_side first_n_layers n_ctx "
    "trust_remote_code token use_auth_token cache_dir local_files_only force_download",
    refused=dict.fromkeys(
        "checkpoint_index checkpoint_label hf_model tokenizer variant subfolder gguf_file quantization_config "
        "load_in_8bit load_in_4bit".split(),
        unless(
            None,
            "",
            False,
            reason="the SAE is for a language model of other weights than those on the Hub; choose another SAE",
        ),
    ),
)

# Of cfg.json and of the object "metadata" in it, which were one object before version 6.
CONFIG = KeyTable(
    obeyed={
        **dict.fromkeys(NAMES, object),
        **dict.fromkeys("architecture d_in d_sae k activation_fn activation_fn_str metadata".split(), object),
        **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "prepend_bos"), bool),
        "finetuning_scaling_factor": bool,
        "d_out": int,
        "hook_name_out": str,
        "activation_fn_kwargs": object,
        "hook_name": str,
        "context_size": int,
        "model_from_pretrained_kwargs": dict,
    },
    # Special tokens are left out here whatever the training did, and weights are read as float32; the rest are settings
    # of trainings, whose configs hold them beside those of the SAE.
    meaningless="sae_lens_version sae_lens_training_version model_class_name exclude_special_tokens neuronpedia_id l0 "
    "hook_layer hook_point_layer dataset_trust_remote_code training_architecture training_architecture_details "
    "sequence_separator_token disable_concat_sequences "
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
    "model_kwargs sae n_batches_for_norm_estimate",
    refused={
        "normalize_activations": _normalization,
        "reshape_activations": unless(None, "", "none", "hook_z", reason="expected 'none' or 'hook_z', heads in a row"),
        **dict.fromkeys(
            ("hook_head_index", "hook_point_head_index", "hook_head_index_out"),
            unless(None, reason="it is of one attention head; choose an SAE of all of them, or of another site"),
        ),
        "seqpos_slice": _positions,
    },
)
