"""A teacher that is another model: larger, with its own hidden size and head, and the student's vocabulary.

Its tokenizer is loaded only to compare it: prompts are rendered by the student's, with the student's chat template
(our choice), so that both models read the same ids. What can be refused is refused before its weights are loaded.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atesd.config import ATESDConfig
from atesd.errors import ConfigError, ModelError
from atesd.models.attention.packed import check_packing, use_packed_attention
from atesd.models.batching import PackedBatch, hidden_rows
from atesd.models.loading import (
    ModelLoadError,
    ModelSource,
    attention_of,
    load_base,
    load_model_config,
    load_tokenizer,
    use_liger_kernels,
)
from atesd.models.scoring import token_logprobs
from atesd.models.teachers import FixedTeacher
from atesd.models.vocabulary import check_same_vocabulary, num_entries, with_entries
from atesd.parallel.parallelism import Parallelism
from atesd_kernels.integrations.backbone import BackboneOutput
from atesd_kernels.integrations.head import HeadError, HeadSpec, hidden_states_and_head, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SETTING = "teacher_model_name_or_path"


def teacher_source(config: ATESDConfig) -> ModelSource | None:
    """Returns the other model that teaches; None where a student's own weights do."""
    if config.teacher != "model" or config.teacher_model_name_or_path is None:
        return None
    dtype = "float32" if config.teacher_weights == "float32" else "bfloat16"
    return ModelSource(config.teacher_model_name_or_path, dtype, SETTING)


def checked_teacher_config(config: ATESDConfig, tokenizer: Any) -> PreTrainedConfig | None:
    """Returns the configuration of the other model that teaches, without its weights; None if there is none.

    Of a teacher behind a server it compares the tokenizer, where the settings name one, and returns None.

    Raises:
        ModelLoadError: it does not exist or is no model, its tokenizer gives a token another id, its files are
            quantised in another way than asked for, or it caps its logits where the student does not.
    """
    if config.teacher_model_name_or_path is not None:
        named = ModelSource(config.teacher_model_name_or_path, "bfloat16", SETTING)
        check_same_vocabulary(tokenizer, load_tokenizer(named), config.model_name_or_path, named.model_name_or_path)
    source = teacher_source(config)
    if source is None:
        return None
    found = load_model_config(source)
    check_stored_weights(config, getattr(found, "quantization_config", None))
    ours, theirs = (
        getattr(each.get_text_config(), "final_logit_softcapping", None) for each in (load_model_config(config), found)
    )
    if ours != theirs:
        raise ModelLoadError(
            f"{SETTING} is {source.model_name_or_path!r}, whose final_logit_softcapping is {theirs}, and the student's "
            f"is {ours}: the loss takes one softcap for both. Use a teacher of the student's family"
        )
    return found


def check_stored_weights(config: ATESDConfig, quantization: Any) -> None:
    """Raises ModelLoadError for files that hold quantised weights, unless they have the 4 bits that were asked for."""
    if not quantization:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    four_bits, method = settings.get("load_in_4bit", False), settings.get("quant_method")
    if not (four_bits and config.teacher_weights == "4bit"):
        advice = "set teacher_weights to '4bit'" if four_bits else "use its unquantised files"
        raise ModelLoadError(
            f"{SETTING} is {config.teacher_model_name_or_path!r}, whose files are quantised (quant_method {method!r}), "
            f"and teacher_weights is {config.teacher_weights!r}: {advice}"
        )


def check_teacher_place(config: ATESDConfig, parallelism: Parallelism) -> None:
    """Raises ConfigError if this machine, or this number of processes, cannot hold the teacher where it was asked for.

    Call it before anything is loaded.
    """
    device, count = config.teacher_device, parallelism.processes.count
    if config.teacher_weights == "4bit" and parallelism.shards_teacher:
        raise ConfigError(
            "teacher_weights is '4bit' under FSDP2, which cannot shard such weights: set it to 'bfloat16', or use "
            "ddp.yaml, where every process holds the teacher"
        )
    if device is None:
        return
    if count > 1:
        raise ConfigError(
            f"teacher_device is {device!r}, and {count} processes train, each on a device of its own: leave it out"
        )
    try:
        torch.zeros(1, device=device).cpu()  # "meta" is a device, too, and holds no weights
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"teacher_device is {device!r}, which this machine does not have ({str(error).splitlines()[0]}): leave it "
            "out, or name another"
        ) from error


def load_teacher(config: ATESDConfig, source: ModelSource, parallelism: Parallelism) -> nn.Module:
    """Returns the other model, frozen, in eval mode, on its device, or this process's shards of it."""
    device = torch.device(config.teacher_device or parallelism.device)
    if config.teacher_weights == "4bit":
        model: Any = load_base(source, attention_of(config), **four_bit_options(device))
    else:
        model = load_base(source, attention_of(config))
    if config.use_liger_kernel:
        use_liger_kernels(model)
    use_packed_attention(model)
    model = model.eval().requires_grad_(False)
    return model if config.teacher_weights == "4bit" else parallelism.place_teacher(model, device)


def four_bit_options(device: torch.device) -> dict[str, Any]:
    """Returns arguments of `from_pretrained` for bitsandbytes' NF4: linear layers in 4 bits, head and embedding not."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


class OtherTeacher(FixedTeacher):
    """Computes hidden states with a model of its own; see `teachers.AnyTeacher`.

    Its weights are read from its files at each start, whose digest a resumed run compares.

    Args:
        model: frozen, in eval mode, with packed attention, on its device or sharded.
        student_head: the head whose entries it is compared with; the loss runs on its device.
        entries: number of entries that the tokenizer knows; those beyond are excluded from the teacher's head.
        dtype: of its hidden states and head, in the loss; None: as they are, for a loss under autocast.

    Raises:
        ModelError: the loss does not support its head, or packed rows do not work with its attention.
    """

    kind = "model"
    remote = shares_head = False

    def __init__(self, model: nn.Module, student_head: HeadSpec, entries: int, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype
        self.device = unwrap(model).device
        try:
            with current(self.device):
                self.backbone, own = hidden_states_and_head(model)
                check_packing(model)
                student_head.divergence_options(1.0, own)
        except (HeadError, ModelError) as error:
            raise ModelError(f"the teacher cannot teach this student: {error}") from error
        self.loss_device = student_head.weight.device
        rows = min(student_head.weight.shape[0], own.weight.shape[0])
        head = with_entries(own, rows, min(entries, rows))
        self.head = HeadSpec(self.beside_loss(head.weight), self.beside_loss(head.bias), head.softcap, head.scale)

    def beside_loss(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(self.loss_device, self.dtype or tensor.dtype)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Returns `(N, hidden)`, the teacher's hidden size: the states that predict the response tokens of `batch`.

        Raises:
            ModelError: a response holds an entry that only the student's head has.
        """
        largest, rows = max(batch.response_ids, default=0), self.head.weight.shape[0]
        if largest >= rows:
            raise ModelError(
                f"a response holds token {largest}, and teacher and student share {rows} entries: the rollout engine "
                "must sample tokens of the tokenizer only"
            )
        return hidden_rows(self.backbone_call, batch)

    def prepare(self, batch: PackedBatch) -> None:
        """No-op: it is asked as it comes."""

    def target_logprobs(self, batch: PackedBatch, chunk_bytes: int | None = None) -> Tensor:
        """Returns the log-probability, at temperature 1, of each response token of `batch`, `(N,)`."""
        return token_logprobs(self.backbone_call, self.head, batch, chunk_bytes)

    @torch.no_grad()
    def backbone_call(self, **inputs: Any) -> BackboneOutput:
        """Runs the backbone on its device. The states come back to the loss's. `attention_mask` stays on the CPU."""
        there = {name: inputs[name].to(self.device) for name in ("input_ids", "position_ids")}
        with current(self.device):
            states = self.backbone(**{**inputs, **there}).last_hidden_state
        return BackboneOutput(self.beside_loss(states))


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which `device` is the current GPU: Triton launches there, whatever its tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def make_other_teacher(
    config: ATESDConfig, source: ModelSource, student_head: HeadSpec, tokenizer: Any, parallelism: Parallelism
) -> OtherTeacher:
    """Loads the model that teaches. Raises ModelLoadError, ModelError."""
    model = load_teacher(config, source, parallelism)
    dtype = None if config.bf16 else student_head.weight.dtype
    with torch.autocast(parallelism.device.type, torch.bfloat16, enabled=config.attn_implementation != "sdpa"):
        return OtherTeacher(model, student_head, num_entries(tokenizer), dtype)
