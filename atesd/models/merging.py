"""Merges adapters into the layers that they adapt: by peft's own merge, in a copy, one layer at a time.

The model's weights stay as they are, because adding and subtracting an update does not restore a bfloat16 base.
`merge_problem` asks whether the merged layer can stand in for the adapted one, and `check_mergeable` asks it for a
whole model. Both are for the start of a run: the answer depends on the kind of adapter, not on its weights.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from atesd.errors import ModelError
from atesd.parallel.sharding import drop_zero_hooks, full_tensor, gathered_params, is_sharded
from atesd_kernels.integrations.head import unwrap
from atesd_kernels.integrations.wrappers import without_wrappers

TOLERANCE = 1e-3  # relative, of outputs in float32; a wrong formula is off by more than 1e-2


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the modules that peft put in place of the model's, by name; of nested ones only the outermost.

    peft nests its layers for `target_parameters` (experts). A module in `modules_to_save` is one of them too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}

    def search(module: nn.Module, name: str) -> None:
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            found[name] = module
            return
        for child_name, child in module.named_children():
            search(child, f"{name}.{child_name}" if name else child_name)

    search(model, "")
    return found


@torch.no_grad()
def merged_module(module: nn.Module) -> nn.Module:
    """Returns what peft merges `module` into, a module of the kind that the model had before, with tensors of its own.

    Half precision is widened to float32 first, so that the sum is rounded once. Gathers sharded tensors on every
    process, so all processes must call this together.

    Raises:
        Exception: peft's own, if it cannot merge the module; ModelError if its weights are quantised.
    """
    with gathered_params(list(module.parameters())):
        return merge(own_copy(module))


def own_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` that shares its tensors. Sharded ones are gathered; ZeRO-3's must be already."""
    memo: dict[int, Any] = {id(b): full_tensor(b) for b in module.buffers()}
    memo |= {id(p): nn.Parameter(full_tensor(p).detach(), requires_grad=False) for p in module.parameters()}
    copied = copy.deepcopy(module, memo)
    drop_zero_hooks(copied)
    return copied


def merge(module: Any) -> nn.Module:
    """Merges a copied `module`: like `merged_module`, but changes the copy's modules, not its shared tensors."""
    own_base(module)
    return merged_in_place(module)


def own_base(module: Any) -> None:
    """Gives the base layers inside a copied `module` new tensors, at least float32, to merge into."""
    for base in (layer.get_base_layer() for layer in tuner_layers(module)):
        for part in base.modules():
            for name, p in part.named_parameters(recurse=False):
                if not p.is_floating_point() or p.dtype.itemsize < 2:
                    raise ModelError(f"its weights are {p.dtype}: load the model unquantised")
                wide = torch.promote_types(p.dtype, torch.float32)
                setattr(part, name, nn.Parameter(p.detach().to(wide, copy=True), requires_grad=False))


def tuner_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in module.modules() if isinstance(m, BaseTunerLayer)]


def merged_in_place(module: Any) -> nn.Module:
    """Merges every adapter inside `module` into its base layer. Returns `module` without them."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if hasattr(module, "base_layer"):
        if not module.disable_adapters:
            module.merge()
        return merged_in_place(module.base_layer)
    for name, child in module.named_children():
        setattr(module, name, merged_in_place(child))
    return module


@torch.no_grad()
def merge_problem(module: nn.Module) -> str | None:
    """Returns why peft's merge of an adapted `module` cannot stand in for it; None if it can.

    Compares the outputs on random inputs, with noise on the adapter's weights: a new adapter changes nothing, and would
    agree with any formula. Trusts peft for modules that are neither linear layers nor embeddings (experts), whose
    inputs are unknown. All processes must call this together.
    """
    try:
        with gathered_params(list(module.parameters())):
            difference = merge_difference(own_copy(module).eval())
    except Exception as error:  # whatever peft or the layer raises is the answer
        return f"{type(error).__name__}: {error}"
    return None if difference < TOLERANCE else f"the merged layer's output differs by {difference:.2g} (relative)"


def merge_problems(model: nn.Module) -> dict[str, str]:
    """Returns the `merge_problem` of each adapted module that has one, by name."""
    problems = {name: merge_problem(module) for name, module in adapted_modules(unwrap(model)).items()}
    return {name: problem for name, problem in problems.items() if problem}


def merge_difference(probe: Any) -> float:
    """Returns how much merging a copied module changes its outputs, relative to their norm; 0.0 for unknown inputs."""
    generator = torch.Generator().manual_seed(0)
    own_base(probe)
    add_noise(probe, generator)
    inputs = probe_inputs(base_of(probe), generator)
    with torch.autocast(next(probe.parameters()).device.type, enabled=False):
        expected = None if inputs is None else probe(inputs)
        merged = merged_in_place(probe)
        return 0.0 if expected is None else float((merged(inputs) - expected).norm() / expected.norm())


def base_of(module: Any) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def add_noise(module: Any, generator: torch.Generator) -> None:
    """Gives the adapters' weights inside a copied `module` new values, in float32."""
    base = {id(p) for p in base_of(module).parameters()}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if id(p) not in base and p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator).to(p.device)
                setattr(part, name, nn.Parameter(p.detach().float() + 0.1 * noise, requires_grad=False))


def probe_inputs(base: nn.Module, generator: torch.Generator) -> Tensor | None:
    """Returns random inputs `(2, 3)` or `(2, 3, width)` for a linear layer or an embedding; None for another module."""
    device = next((p.device for p in base.parameters()), None)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (2, 3), generator=generator).to(device)
    if isinstance(base, nn.Linear):
        return torch.randn(2, 3, base.in_features, generator=generator).to(device)
    return None


def check_mergeable(model: nn.Module, remedy: str) -> None:
    """Checks that peft can merge the adapters of `model`, so that the merged model has the same logits.

    All processes must call this together. Runs no forward of the model.

    Raises:
        ModelError: a tuner or layer that peft cannot merge, or an adapter on a tied weight. It ends with `remedy`.
    """
    wrapper = without_wrappers(model)
    if not hasattr(wrapper, "peft_config"):
        return
    kind = wrapper.active_peft_config.peft_type.value
    if problem := tuner_problem(wrapper):
        raise ModelError(f"the {kind} adapter cannot be merged into the model: {problem}. {remedy}")
    base = unwrap(model)
    modules = adapted_modules(base)
    tied = tied_parameters(base, modules)
    for name, module in modules.items():
        problem = f"{tied[name]!r} has the same weight, and no adapter" if name in tied else merge_problem(module)
        if problem:
            raise ModelError(f"the {kind} adapter on {name!r} cannot be merged into the model: {problem}. {remedy}")


def tuner_problem(model: Any) -> str | None:
    """Returns why peft cannot merge a `PeftModel` at all; None if it comes down to the single layers."""
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        return "peft has no merge for it"
    try:
        with warnings.catch_warnings():  # of tied weights, which `tied_parameters` finds
            warnings.simplefilter("ignore")
            model.base_model._check_merge_allowed()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def tied_parameters(base: nn.Module, modules: dict[str, Any]) -> dict[str, str]:
    """Returns, for adapted modules whose weight is also another module's, that weight's name there."""
    owner = {id(p): name for name, module in modules.items() for p in base_of(module).parameters()}
    found = {}
    for full_name, p in base.named_parameters(remove_duplicate=False):
        name = owner.get(id(p))
        if name is not None and not full_name.startswith(f"{name}."):
            found[name] = full_name
    return found


@torch.no_grad()
def check_decodable(model: nn.Module, problems: dict[str, str]) -> None:
    """Checks that decoding token by token, with the base model's own forward, computes what the adapted model does.

    Args:
        problems: the adapted modules that do not merge, from `merge_problems`. A merged one acts on each token alone.

    Raises:
        ModelError: a tuner with a forward of its own (X-LoRA, Poly), or an adapter whose update of a token depends on
            other tokens (aLoRA, Lily).
    """
    wrapper = without_wrappers(model)
    if not hasattr(wrapper, "peft_config"):
        return
    configs = [wrapper.peft_config[name] for name in wrapper.active_adapters]
    kinds = ", ".join(config.peft_type.value for config in configs)
    if problem := None if is_sharded(model) else forward_problem(wrapper):
        raise ModelError(
            f"the {kinds} adapter acts outside the model's layers ({problem}), so decoding would leave it out: take an "
            "adapter inside the layers (LoRA, DoRA, OFT, IA3 and others)."
        )
    alora = any(getattr(config, "alora_invocation_tokens", None) for config in configs)
    base = unwrap(model)
    looking = "alora_invocation_tokens" if alora else next((n for n in problems if mixes_tokens(base, n)), None)
    if looking:
        raise ModelError(
            f"the {kinds} adapter changes a token by what other tokens are ({looking}), so decoding token by token "
            "would not give what a forward over the text gives: take an adapter that treats all tokens alike "
            "(LoRA, DoRA, OFT, IA3 and others)."
        )


def mixes_tokens(base: nn.Module, name: str) -> bool:
    """Whether the adapted module `name` gives a token another output without the tokens before it."""
    generator = torch.Generator().manual_seed(0)
    probe: Any = own_copy(base.get_submodule(name)).eval()
    inputs = probe_inputs(base_of(probe), generator)
    if inputs is None:
        return False
    own_base(probe)
    add_noise(probe, generator)
    with torch.autocast(inputs.device.type, enabled=False):
        expected = probe(inputs)[:, -1:]
        return not (probe(inputs[:, -1:]) - expected).norm() < TOLERANCE * expected.norm()


def forward_problem(model: Any) -> str | None:
    """Returns how the forward of a `PeftModel` differs from that of its base model with adapted layers, or None."""
    training, base = model.training, unwrap(model)
    ids = torch.tensor([[0, 1]], device=next(base.parameters()).device)
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        error = float((base(input_ids=ids, use_cache=False).logits.float() - expected).norm() / expected.norm())
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(training)
    return None if error < TOLERANCE else f"its logits differ by {error:.2g} (relative)"
