"""The parameters of the functions that the migration pages compare with, in the versions that the pages name.

`tests/docs/test_migration.py` compares the entries with the packages that are installed, `make packages` with more.
"""

import inspect
import pkgutil

import torch

SIGNATURES = {
    "torch.nn.functional.linear_cross_entropy": "input linear_weight target linear_bias weight reduction ignore_index "
    "label_smoothing options",
    "torch.nn.LinearCrossEntropyOptions": "allow_retain_graph batch_chunk_size chunking_method acc_policy acc_dtype",
    "torch.nn.LinearCrossEntropyLoss": "in_features num_classes out_features bias device dtype reduction weight "
    "ignore_index label_smoothing options",
    "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy": "input weight target bias ce_weight "
    "ignore_index lse_square_scale label_smoothing reduction softcap return_z_loss accum_dtype use_token_scaling "
    "return_token_accuracy return_predicted_tokens chunk_mem_const",
    "liger_kernel.transformers.functional.liger_fused_linear_scaled_cross_entropy_tp": "input weight target tp_group "
    "temperature ignore_index tiles_per_reduce return_entropy",
    "liger_kernel.transformers.functional.liger_fused_linear_jsd": "student_input student_weight teacher_input "
    "teacher_weight shift_labels jsd_beta ignore_index temperature accum_dtype",
    "cut_cross_entropy.linear_cross_entropy": "e c targets ignore_index softcap reduction shift filter_eps impl",
    "trl.trainer.utils.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.trainer.distillation_trainer._chunked_divergence_loss": "student_hidden_states teacher_hidden_states "
    "student_lm_head_weight teacher_lm_head_weight completion_mask beta num_items_in_batch student_lm_head_bias "
    "teacher_lm_head_bias student_logit_scale teacher_logit_scale student_final_logit_softcapping "
    "teacher_final_logit_softcapping temperature",
    "deepspeed.sequence.linear_cross_entropy.vocab_parallel_linear_cross_entropy": "hidden weight target bias tp_group "
    "sp_group vocab_start_index vocab_end_index ignore_index reduction chunk_size",
    "deepspeed.runtime.sequence_parallel.ulysses_sp.TiledFusedLogitsLoss": "fn self x y mask shards compute_params "
    "output_reduction",
    "megatron.core.tensor_parallel.vocab_parallel_cross_entropy": "vocab_parallel_logits target label_smoothing "
    "tp_group",
}


def recorded(name: str) -> list[str]:
    return SIGNATURES[name].split()


def installed(name: str) -> list[str]:
    """The parameters of a function or a class as they are here; ImportError if its package is not."""
    found = pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    if inspect.isclass(found) and issubclass(found, torch.autograd.Function):  # it takes what its forward takes
        return list(inspect.signature(found.forward).parameters)[1:]  # but the context
    return list(inspect.signature(found).parameters)
