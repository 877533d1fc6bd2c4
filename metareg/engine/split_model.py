"""An `nn.Module` as two pure functions: ``features = body(params, x)`` and ``outputs = head(params, features)``."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metareg.engine.blocks import Block, fuse_blocks
from metareg.engine.normalisation import (
    SupportNorm,
    cheapen_second_derivative,
    is_only_normalisation,
    normalise_by_first,
)
from metareg.engine.side_effects import SideEffects, call_purely, observe
from metareg.errors import UnknownNameError, UsageError
from metareg.util.layout import copy_contiguous, make_channels_last, make_contiguous
from metareg.util.torch_internals import (
    BATCH_NORM,
    DROPOUT,
    NORM_WITH_STATISTICS,
    copy_shell,
    list_places,
    normalise_inputs,
    tree_leaves,
    tree_map,
    unwrap_compiled,
)  # fmt: skip

__all__ = ["SplitModel"]

log = logging.getLogger("metareg")

Params = Mapping[str, Tensor]
_Part = Literal["module", "body", "head", "neck"]
"""The whole module, the part before the head, the head, and the head without its last layer."""
_NO_EFFECTS = SideEffects()


class SplitModel:
    """A copy of a user's model, split into body and head, that takes its parameters as arguments.

    A module with the submodules `body` and `head` is split there, an `nn.Sequential` before its last layer, and any
    other module at the submodule `head`, which its forward pass must apply last. If no head is known, the whole module
    is the body and the head is the identity.

    Modules wrapped by `torch.compile` are unwrapped, because the strategy decides what is compiled.

    BatchNorm layers of the copy use the statistics of the current batch and keep no running statistics, which would
    leak from one task into the next. Other layers' writes into buffers, attributes or parameters are discarded after
    each call, once `observe` has detected them (metareg.engine.side_effects).

    Args:
        model: any module; it is copied and never changed.
        head: the dotted name of the head.

    Raises:
        UnknownNameError: `model` has no submodule named `head`.
        UsageError: the model draws random numbers (dropout), or has trainable parameters outside body and head, or of
            several types.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
        if lazy is not None:
            raise UsageError(f"The model's parameter '{lazy}' has no shape yet; run the model on an example first.")
        self.module = unwrap_compiled(copy.deepcopy(model))
        self._refuse_dropout()
        self.batch_norms = self._drop_running_statistics()
        body, head_part, self.body_prefix, self.head_prefix = _split(self.module, head)
        if self.batch_norms:
            body, head_part = (_replace(part, BATCH_NORM, _cheapen) for part in (body, head_part))
        body, head_part = fuse_blocks(body), fuse_blocks(head_part)
        self._last_linear = _find_last_linear(head_part) if self.head_prefix is not None else None
        neck = nn.Identity() if not self._last_linear else _remove(head_part, self._last_linear)
        self._modules: dict[_Part, nn.Module] = {"body": body, "head": head_part, "neck": neck}
        self._support_norms: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._lock = RLock()
        """Held while the modules are used, because `functional_call` swaps values into them during a call."""

        trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not trainable:
            raise UsageError(f"The model {type(model).__name__} has no trainable parameter.")
        _refuse_types(trainable)
        self.names = tuple(trainable)
        # Tied weights are one parameter under their first name. A parameter shared by body and head belongs to the
        # body.
        first_names = {id(p): name for name, p in trainable.items()}
        everywhere = {
            name: first_names[id(p)]
            for name, p in self.module.named_parameters(remove_duplicate=False)
            if p.requires_grad
        }
        prefix = self.head_prefix
        in_head = {name: first for name, first in everywhere.items() if prefix is not None and name.startswith(prefix)}
        in_body = {name: first for name, first in everywhere.items() if name not in in_head}
        self.body_names = tuple(name for name in trainable if name in in_body.values())
        self.head_names = tuple(name for name in trainable if name not in self.body_names)
        in_body, in_head, everywhere = (
            _drop_repeated_places(self.module, part) for part in (in_body, in_head, everywhere)
        )
        in_head = {name[len(prefix or "") :]: first for name, first in in_head.items()}
        self._places: dict[_Part, dict[str, str]] = {
            "module": everywhere,
            "body": {name[len(self.body_prefix) :]: first for name, first in in_body.items()},
            "head": in_head,
            "neck": {place: first for place, first in in_head.items() if self._is_in_neck(place)},
        }
        """Parameter names by their names within a part."""
        self._has_blocks = any(isinstance(layer, Block) for part in (body, head_part) for layer in part.modules())
        self.layout: Literal["channels last", "channels first", "as given"] = "as given"
        """The order in memory that suits images; `examine` finds out."""
        self._effects: dict[_Part, SideEffects] = {}
        """The side effects of each part that `examine` has observed."""
        self._written: list[str] = []
        """The names of what the forward pass writes, without internal state of torch's layers."""
        stray = [name for name in in_body if not name.startswith(self.body_prefix)]
        if stray:
            raise UsageError(
                f"The model {type(model).__name__} has the parameter '{stray[0]}' that is in neither body nor head; "
                "move it into one of them, or name the head's submodule with head=…"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Omit the lock, which cannot be copied or pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())

    @property
    def has_head(self) -> bool:
        """Whether the head is known."""
        return self.head_prefix is not None

    @property
    def forwards(self) -> list[Any]:
        """The functions that its modules run when they are called."""
        return [type(each).forward for each in self.module.modules()]

    def initial_parameters(self) -> dict[str, Tensor]:
        """Return contiguous copies of the trainable parameters by name."""
        return copy_contiguous({name: p for name, p in self.module.named_parameters() if p.requires_grad})

    def constants(self) -> dict[str, Tensor]:
        """The tensors that are not arguments, by name: buffers and frozen parameters."""
        with self._lock:
            trainable = {name for name, p in self.module.named_parameters(remove_duplicate=False) if p.requires_grad}
            return {name: value for name, value in self.module.state_dict().items() if name not in trainable}

    def body(self, params: Params, x: Any) -> Tensor:
        """Return features ``[examples, …]`` of inputs ``[examples, …]``."""
        return self._call("body", params, x)

    def head(self, params: Params, features: Tensor) -> Tensor:
        """Return outputs ``[examples, …]`` of features ``[examples, …]``."""
        return self._call("head", params, features)

    def embed(self, params: Params, features: Tensor) -> Tensor:
        """Return the inputs of the head's last layer ``[examples, …]`` for features ``[examples, …]``."""
        return self._call("neck", params, features)

    @property
    def output_layer(self) -> tuple[str, str | None]:
        """The names of the weight ``[outputs, inputs]`` and the bias ``[outputs]`` of the head's last layer.

        Raises:
            UsageError: the head does not end in an `nn.Linear`, or that layer is frozen.
        """
        if self._last_linear is None:
            raise UsageError(
                f"The head of {type(self.module).__name__} must be an nn.Linear, or an nn.Sequential that ends in one, for "
                "an algorithm that computes its last layer."
            )
        in_head, in_neck = self._places["head"], self._places["neck"]
        last = {place.rpartition(".")[2]: first for place, first in in_head.items() if place not in in_neck}
        if "weight" not in last:
            raise UsageError(
                f"The last layer of the head of {type(self.module).__name__} is frozen (its requires_grad is False); an "
                "algorithm that computes its values needs it to be trainable."
            )
        return last["weight"], last.get("bias")

    def forward(self, params: Params, x: Any) -> tuple[Tensor, Tensor]:
        """Return features and outputs ``[examples, …]`` of inputs ``[examples, …]``."""
        features = self.body(params, x)
        return features, self.head(params, features)

    def body_of_query(self, params: Params, support_x: Any, query_x: Any) -> tuple[Tensor, Tensor]:
        """Return features of support and query set; BatchNorm uses the support set's statistics for both."""
        examples = tree_leaves(support_x)[0].shape[0]
        body, _ = self._find_support_norms(examples)
        both = tree_map(lambda s, q: torch.cat([s, q]), support_x, query_x)
        features = self._call("body", params, both, body)
        return features[:examples], features[examples:]

    def head_of_query(self, params: Params, support_features: Tensor, query_features: Tensor) -> Tensor:
        """Return outputs for the query set; BatchNorm uses the support set's statistics."""
        examples = support_features.shape[0]
        _, head = self._find_support_norms(examples)
        both = torch.cat([support_features, query_features])
        return self._call("head", params, both, head)[examples:]

    def create_adapted_module(
        self, params: Params, statistics_of: Any = None, head: nn.Module | None = None
    ) -> nn.Module:
        """Create a module of the user's own class with these parameters, in evaluation mode.

        Args:
            params: parameters by name.
            statistics_of: inputs ``[examples, …]`` whose statistics the BatchNorm layers will use; None for those of
                each batch.
            head: a replacement for the head, if any.
        """
        with self._lock:
            module = copy.deepcopy(self.module)
        own = dict(module.named_parameters())
        for name in self.names:
            own[name].data = params[name].detach().clone()
        if statistics_of is not None:
            _fix_statistics(module, statistics_of)
        if head is not None:
            module.set_submodule((self.head_prefix or "").removesuffix("."), head)
        return module.eval()

    def settle(self, module: nn.Module, params: Params, x: Any) -> nn.Module:
        """Make layers with side effects in an adapted module predict as in this model.

        In evaluation mode, a spectral norm no longer iterates, so each such layer is called once first. Layers that
        still compute something else, such as layers with their own running statistics, stay in the model's mode.

        Args:
            module: the result of `create_adapted_module` for `params`, without a replaced head.
            params: parameters by name.
            x: inputs ``[examples, …]``.
        """
        owners = [self._find_owner(name) for name in self._written]
        layers = {name for name, layer in self.module.named_modules() if layer in owners and layer.training}
        if not layers:
            return module
        _, expected = self.forward(params, x)
        settled = copy.deepcopy(module)
        _set_modes(settled, layers, training=True)
        settled(x)
        _set_modes(settled, layers, training=False)
        if _are_alike(expected, settled(x)):
            return settled
        _set_modes(module, layers, training=True)
        log.warning(
            "In evaluation mode, the layer%s %s would compute something else; the adapted module stays in training "
            "mode there.",
            "s" * (len(layers) > 1),
            ", ".join(sorted(name or type(module).__name__ for name in layers)),
        )
        return module

    def examine(self, params: Params, x: Any) -> Tensor:
        """Run the model on some inputs: record the side effects of its forward pass, and check the split.

        Returns:
            The outputs ``[examples, …]``.

        Raises:
            UsageError: ``head(body(x))`` differs from the module's own forward pass, so training would optimise another
                function; or the forward pass draws random numbers.
        """
        # The module's own BatchNorm is too imprecise for channels-last images (metareg.engine.normalisation).
        x = tree_map(make_contiguous, x)
        outputs = self._check_split(params, x)
        self.layout = "as given"
        if isinstance(x, Tensor) and x.dim() == 4:
            self.layout = self._find_layout(params, x if len(x) > 1 else torch.cat([x, x]))
        return outputs

    def to(self, device: torch.device) -> None:
        """Move the constants (buffers, frozen parameters)."""
        self.module.to(device)

    def _check_split(self, params: Params, x: Any) -> Tensor:
        if not self.has_head or type(self.module).forward is nn.Module.forward:
            return self._observe_parts(params, x)
        with self._lock:
            whole, _ = observe(self.module, self._place("module", params), x)
        try:
            parts = self._observe_parts(params, x)
        except UsageError:
            raise
        except Exception:  # a head can raise anything on inputs that it is not made for
            parts = torch.empty(0)
        if not _are_alike(whole, parts):
            raise UsageError(
                f"The model {type(self.module).__name__} does not compute head(body(x)); the head must be the last "
                "layer that its forward pass applies."
            )
        return parts

    def _find_layout(self, params: Params, images: Tensor) -> Literal["channels last", "channels first", "as given"]:
        """Find out whether the model accepts images that are channels last, and runs faster with them.

        It does not if its own code calls `view` on maps. BatchNorm and the layers after it run as one operation with them.
        """
        try:
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
                expected = self.head(leaves, self.body(leaves, images))
                found = self.head(leaves, self.body(leaves, make_channels_last(images)))
                torch.autograd.grad(found.square().sum(), list(leaves.values()), allow_unused=True)
        except Exception:  # running a user's forward pass can raise many kinds of errors
            return "channels first"
        if not _are_alike(expected, found):
            return "channels first"
        # BatchNorm in the user's own code can be too imprecise for such images, and the user's loss can call `view` on maps.
        is_precise = bool((found - expected).norm() <= 1e-4 * expected.norm())
        suits = self._has_blocks and is_precise and found.stride() == expected.stride()
        return "channels last" if suits else "as given"

    def _call(self, part: _Part, params: Params, x: Any, module: nn.Module | None = None) -> Tensor:
        """Return the outputs of a part, or of a module that replaces it."""
        if part == "body" and self.layout == "channels first":
            x = tree_map(make_contiguous, x)
        values, effects = self._place(part, params), self._effects.get(part, _NO_EFFECTS)
        with self._lock:
            return call_purely(module or self._modules[part], values, x, effects)

    def _place(self, part: _Part, params: Params) -> dict[str, Tensor]:
        """Return the parameters of a part by their names in it, including every name of a tied weight."""
        return {place: params[name] for place, name in self._places[part].items()}

    def _is_in_neck(self, place: str) -> bool:
        """Return whether a name in the head is also in the neck."""
        return place.rpartition(".")[0] != self._last_linear

    def _observe_parts(self, params: Params, x: Any) -> Tensor:
        """Return the outputs of head and body, and record the side effects of both."""
        with self._lock:
            features, of_body = observe(self._modules["body"], self._place("body", params), x)
            outputs, of_head = observe(self._modules["head"], self._place("head", params), features)
            in_neck = tuple(place for place in of_head.tensors if self._is_in_neck(place))
            self._effects = {"body": of_body, "head": of_head, "neck": replace(of_head, tensors=in_neck)}
        self._written = [
            *self._list_written(of_body, self.body_prefix),
            *self._list_written(of_head, self.head_prefix or ""),
        ]
        if self._written:
            log.warning(
                "The forward pass of %s writes to %s; these writes are discarded after each call, so that gradients, "
                "evaluation and adaptation do not change the learner.",
                type(self.module).__name__,
                ", ".join(self._written),
            )
        return outputs

    def _list_written(self, effects: SideEffects, prefix: str) -> list[str]:
        """List the names of what a part writes, without internal state of torch's layers, such as recurrent ones."""
        named = [f"{prefix}{name}" for name in effects.attributes]
        own = [name for name in named if not type(self._find_owner(name)).__module__.startswith("torch.")]
        return [*(f"{prefix}{name}" for name in effects.tensors), *own]

    def _find_owner(self, name: str) -> nn.Module:
        """Find the submodule that owns a written value; the whole module if none does."""
        layers = dict(self.module.named_modules())
        return layers.get(name.rpartition(".")[0], self.module)

    def _refuse_dropout(self) -> None:
        for name, module in self.module.named_modules():
            rate = module.p if isinstance(module, DROPOUT) else getattr(module, "dropout", 0)
            if isinstance(rate, float) and rate > 0:
                raise UsageError(
                    f"The model's layer '{name}' is {module}: it would draw random numbers inside the inner steps. "
                    "Set its dropout to 0."
                )

    def _drop_running_statistics(self) -> list[str]:
        layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, NORM_WITH_STATISTICS)}
        converted = [name for name, layer in layers.items() if layer.track_running_stats]
        for layer in layers.values():
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        if converted:
            log.info(
                "Running statistics would leak between tasks; converted to normalisation without them: %s.",
                ", ".join(converted),
            )
        return [name for name, layer in layers.items() if isinstance(layer, BATCH_NORM)]

    def _find_support_norms(self, examples: int) -> tuple[nn.Module, nn.Module]:
        if not isinstance(examples, int):  # symbolic, while a program for any number of examples is traced
            return self._create_support_norms(examples)
        if examples not in self._support_norms:
            self._support_norms[examples] = self._create_support_norms(examples)
        return self._support_norms[examples]

    def _create_support_norms(self, examples: int) -> tuple[nn.Module, nn.Module]:
        body, head = (
            _replace(self._modules[part], BATCH_NORM, lambda layer: self._use_support_statistics(layer, examples))
            for part in ("body", "head")
        )
        return body, head

    def _use_support_statistics(self, layer: Any, examples: int) -> nn.Module:
        """Return a copy of a BatchNorm layer that uses the statistics of the first `examples` rows.

        A subclass can compute more than BatchNorm, such as an activation. It gets normalised inputs, and mean 0 and
        variance 1 − eps for its own normalisation.
        """
        if isinstance(layer, Block):
            return layer.use_support_statistics(examples)
        if is_only_normalisation(layer):
            return SupportNorm(layer, examples)
        like = next(self.module.parameters())
        mean, variance = like.new_zeros(layer.num_features), like.new_full((layer.num_features,), 1 - layer.eps)
        statistics = {"running_mean": mean, "running_var": variance}
        return normalise_inputs(layer, statistics, partial(normalise_by_first, examples=examples))


def _set_modes(module: nn.Module, names: Iterable[str], *, training: bool) -> None:
    """Set the mode of some submodules and their children."""
    for name in names:
        module.get_submodule(name).train(training)


def _are_alike(whole: Tensor, parts: Tensor) -> bool:
    """Return whether two computations of the same result agree.

    On CUDA, torch computes float32 convolutions in TF32 with 10 bits, so outputs that are small relative to others of
    the same example cannot be compared one by one.
    """
    if whole.shape != parts.shape:
        return False
    if not bool(torch.isfinite(whole).all()):
        return torch.equal(whole.isfinite(), parts.isfinite())
    tolerance = 1e-6 if whole.dtype == torch.float64 else 1e-2
    return bool((whole - parts).norm() <= tolerance * whole.norm())


def _refuse_types(trainable: Mapping[str, Tensor]) -> None:
    """Refuse mixed or integer types, because batches, noise and plugins' parameters take the model's type."""
    first = next(iter(trainable))
    dtype = trainable[first].dtype
    for name, p in trainable.items():
        if p.dtype != dtype or not p.is_floating_point():
            other = f", while '{first}' is {dtype}" if p.dtype != dtype else ""
            raise UsageError(
                f"The model's parameter '{name}' is {p.dtype}{other}; all trainable parameters must have the same "
                "floating-point type: use model.float() or model.double()."
            )


def _split(module: nn.Module, head: str | None) -> tuple[nn.Module, nn.Module, str, str | None]:
    """Return ``(body, head, prefix of the body's names, prefix of the head's names or None)``."""
    if head is not None:
        submodules = dict(module.named_modules())
        if not head or head not in submodules:
            raise UnknownNameError(
                f"submodule of {type(module).__name__} to be its head", head, [name for name in submodules if name]
            )
        return _remove(module, head), submodules[head], "", f"{head}."
    body_module, head_module = getattr(module, "body", None), getattr(module, "head", None)
    if isinstance(body_module, nn.Module) and isinstance(head_module, nn.Module):
        return body_module, head_module, "body.", "head."
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 1:
        # Not named_children(), which omits a layer that is used twice.
        *before, (last, last_module) = [
            (name, layer) for name, layer in list_places(module).items() if layer is not None
        ]
        if any(True for _ in last_module.parameters()):
            return nn.Sequential(OrderedDict(before)), last_module, "", f"{last}."
    return module, nn.Identity(), "", None


def _find_last_linear(head: nn.Module) -> str | None:
    """Find the dotted name of a head's last linear layer, empty for the head itself; None if there is none."""
    names: list[str] = []
    last: nn.Module | None = head
    while isinstance(last, nn.Sequential) and type(last).forward is nn.Sequential.forward and len(last):
        name, last = list(list_places(last).items())[-1]
        names.append(name)
    return ".".join(names) if isinstance(last, nn.Linear) else None


def _remove(module: nn.Module, name: str) -> nn.Module:
    """Return a copy of the module with one submodule replaced by the identity; the copy shares parameters."""
    first, _, rest = name.partition(".")
    return copy_shell(module, {first: _remove(module.get_submodule(first), rest) if rest else nn.Identity()})


def _replace(module: nn.Module, kind: type, replacement: Any) -> nn.Module:
    """Return a copy of the module with every submodule of a kind replaced; the copy shares parameters."""
    if isinstance(module, kind):
        return replacement(module)
    children = {name: child for name, child in list_places(module).items() if child is not None}
    return copy_shell(module, {name: _replace(child, kind, replacement) for name, child in children.items()})


def _cheapen(layer: BATCH_NORM) -> nn.Module:
    """Return the layer with a cheap second derivative; a user's subclass, which can compute anything, unchanged."""
    plain = type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return cheapen_second_derivative(layer) if plain and layer.affine else layer


def _fix_statistics(module: nn.Module, x: Any) -> None:
    """Set the BatchNorm layers' running statistics to those of their inputs for `x`, without Bessel's correction."""

    layers = {layer: name for name, layer in module.named_modules() if isinstance(layer, BATCH_NORM)}

    def record(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if layer.running_mean is not None:
            raise UsageError(
                f"The model's layer '{layers[layer]}' is applied several times, but can keep the support set's "
                "statistics of only one call; bn_statistics='transductive' uses those of each batch."
            )
        (value,) = inputs
        dims = [0, *range(2, value.dim())]
        layer.running_var, layer.running_mean = torch.var_mean(value, dims, correction=0)

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    # BatchNorm itself is too imprecise for channels-last images (metareg.engine.normalisation).
    with torch.no_grad():
        module.train()(tree_map(torch.Tensor.contiguous, x))
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.track_running_stats = True


def _drop_repeated_places(module: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Remove parameter names that are another name of the same attribute, because a submodule is used several times.

    `functional_call` sets values and then restores the originals. If it gets the same attribute twice, it takes the
    first value for the original and does not restore the real one.
    """
    places: dict[tuple[int, str], str] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        places.setdefault((id(module.get_submodule(owner)), attribute), name)
    return {name: names[name] for name in places.values()}
