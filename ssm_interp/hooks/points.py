"""Hook points: the modules through which the tensors of an SSM mixer can be read and edited."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssm_interp.errors import HookError
from ssm_interp.hooks.own import Asked, Key, has_own_operator, watches
from ssm_interp.reprs import describe

HookFunction = Callable[[Tensor, "HookPoint"], Tensor | None]
Direction = Literal["fwd", "bwd", "both"]

ALWAYS = ("conv", "x", "dt", "B", "C", "y", "z")
ON_REQUEST = ("write", "state", "attn")
FIRING_ORDER = ("conv", "x", "dt", "B", "C", "write", "state", "attn", "y", "z")


@dataclass(frozen=True)
class _Added:
    handle: RemovableHandle
    direction: Direction
    permanent: bool
    level: int | None


class HookPoint(nn.Module):
    """An identity through which one tensor of the mixer passes; a hook on it reads the tensor or replaces it.

    Takes plain PyTorch hooks (`register_forward_hook` and the rest) and, as TransformerLens' hook points do,
    `add_hook(fn)` with `fn(tensor, hook)` returning None or a replacement.

    Attributes:
        name: what passes: conv, x, dt, B, C, write, state, attn, y or z.
        exposed: whether it was asked to fire though nothing is hooked to it. conv, x, dt, B, C, y and z fire anyway
            (where the host runs a fused kernel, y and z do not: the kernel keeps them to itself); write, state and attn
            cost memory, so they fire when exposed or hooked.

    Example:
        >>> ssm.layers[3].hook_attn.register_forward_hook(lambda module, args, attn: attn.tril(-1))
        >>> ssm.layers[3].hook_dt.add_hook(lambda dt, hook: dt * 2)
    """

    def __init__(self, name: str, asked: Asked | None = None) -> None:
        super().__init__()
        self.name = name
        self.asked, self.key = asked or Asked(), Key()
        self.exposures = 0
        self._added: list[_Added] = []

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: the hooks; nobody could close an exposure of it."""
        return self.__dict__ | {"exposures": 0}

    @property
    def exposed(self) -> bool:
        return self.exposures > 0

    @property
    def requested(self) -> bool:
        """Whether somebody wants what passes here: it is exposed, hooked, or (in this thread) being read."""
        return self.exposed or self.has_hooks() or bool(watches(self))

    def has_hooks(self) -> bool:
        """Whether any hook, PyTorch's own or one of `add_hook`, is attached."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    @property
    def hooks(self) -> int:
        """How many hooks there are, PyTorch's own and those of `add_hook`."""
        return sum(map(len, self._hook_tables()))

    def _hook_tables(self) -> list[dict[int, Any]]:
        return [self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks]

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._ask(super().register_forward_hook(*args, **kwargs))

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._ask(super().register_forward_pre_hook(*args, **kwargs))

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._ask(super().register_full_backward_hook(*args, **kwargs))

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self._ask(super().register_full_backward_pre_hook(*args, **kwargs))

    def _ask(self, handle: RemovableHandle) -> RemovableHandle:
        self.asked.now = True
        return handle

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> RemovableHandle:
        """Attach `hook(tensor, hook_point)`; a tensor that it returns replaces the one that passed.

        Args:
            hook: the function. With `dir="bwd"` it gets the gradient.
            dir: "fwd" or "bwd".
            is_permanent: `remove_hooks` leaves it unless told otherwise.
            level: a number by which `remove_hooks` can select it.
            prepend: run before the hooks that are there.

        Raises:
            HookError: no function, or one of other arguments; an unknown direction.
        """
        if not callable(hook):
            got = describe(hook)
            raise HookError(f"add_hook on hook_{self.name} takes a function of (tensor, hook point), got {got}")
        if not _takes_two(hook):
            raise HookError(
                f"add_hook on hook_{self.name} takes a function of (tensor, hook point), which {describe(hook)} is "
                "not; one of PyTorch's, of (module, args, output), goes to register_forward_hook"
            )
        if dir == "fwd":
            handle = self.register_forward_hook(_OfOutput(hook), prepend=prepend)
        elif dir == "bwd":
            handle = self.register_full_backward_hook(_OfGradient(hook), prepend=prepend)
        else:
            raise HookError(f"add_hook on hook_{self.name}: dir must be 'fwd' or 'bwd', got {describe(dir)}")
        self._added.append(_Added(handle, dir, is_permanent, level))
        return handle

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove what `add_hook` attached in this direction, or in "both" (and at this level, if one is given).

        Raises:
            HookError: an unknown direction.
        """
        if dir not in get_args(Direction):
            got = describe(dir)
            raise HookError(f"remove_hooks on hook_{self.name}: dir must be 'fwd', 'bwd' or 'both', got {got}")
        kept = []
        for added in self._added:
            selected = dir in ("both", added.direction) and level in (None, added.level)
            if selected and (including_permanent or not added.permanent):
                added.handle.remove()
            else:
                kept.append(added)
        self._added = kept

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Take off every hook, PyTorch's own too; those of `add_hook(..., is_permanent=True)` only if told so."""
        self._added = [added for added in self._added if added.permanent and not including_permanent]
        kept = {added.handle.id for added in self._added}
        ways = (self._forward_hooks_with_kwargs, self._forward_hooks_always_called, self._forward_pre_hooks_with_kwargs)
        for table in (*self._hook_tables(), *ways):
            for key in table.keys() - kept:
                del table[key]

    def extra_repr(self) -> str:
        fires = "fires" if self.name in ALWAYS or self.requested else "fires when exposed or hooked"
        return f"{self.name}, {fires}" + (f", has {_number(self.hooks)}" if self.hooks else "")


def _takes_two(hook: Callable[..., Any]) -> bool:
    try:
        inspect.signature(hook).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a builtin, which does not say
        return True
    return True


def _number(hooks: int) -> str:
    return f"{hooks} hook{'s' * (hooks > 1)}"


@dataclass(frozen=True)
class _OfOutput:
    """A hook of `add_hook` as PyTorch calls it; a copied or unpickled point calls it with itself."""

    hook: HookFunction

    def __call__(self, point: Any, _args: Any, output: Tensor) -> Tensor | None:
        return self.hook(output, point)


@dataclass(frozen=True)
class _OfGradient:
    hook: HookFunction

    def __call__(self, point: Any, _grad_input: Any, grad_output: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        (gradient,) = grad_output
        replaced = self.hook(gradient, point)
        return None if replaced is None else (replaced,)


class HookPoints(nn.Module):
    """The hook points of one SSM mixer, a child module of it by the name `ssm`.

    Letters: b batch, t target position, s source position, h head, p head_dim, g group, n state.

    In firing order: `hook_conv` [b t d] (what enters the convolution; its channels are those of x in the Mamba-1
    family, and those of x, B and C after each other in the Mamba-2 family), `hook_x` [b t h p], `hook_dt` [b t h] (the
    effective step), `hook_B` and `hook_C` [b t g n], `hook_write` [b t h p n] (dt B x), `hook_state` [b t h p n],
    `hook_attn` [b h t s] (dt folded in: unedited, y = attn @ x; knockouts act behind it), `hook_y` [b t h p] (M x,
    before D-skip and gate), and in the Mamba-1 family `hook_z` [b t h p] (the gate, before its SiLU; elsewhere it never
    reaches the operator). Edits of conv act on all that is made of it, those of x, dt, B, C and write on the
    recurrence; an edited state is the state, from which later
    positions go on; an edit of attn adds (attn' - attn) x; an edit of y comes last.

    Attributes:
        layer: index of the layer in the model.
        heads: how many heads (in the Mamba-1 family: channels) the mixer has.
        head_dim: how many values a head has.
        state_size: how many state dimensions a head has.
    """

    hook_conv: HookPoint
    hook_x: HookPoint
    hook_dt: HookPoint
    hook_B: HookPoint
    hook_C: HookPoint
    hook_write: HookPoint
    hook_state: HookPoint
    hook_attn: HookPoint
    hook_y: HookPoint
    hook_z: HookPoint

    def __init__(
        self,
        layer: int,
        heads: int,
        head_dim: int,
        state_size: int,
        gated: bool,
        own_operator: bool,
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim, self.state_size = layer, heads, head_dim, state_size
        self.asked, self.key = Asked(), Key()
        for name in FIRING_ORDER:
            if name != "z" or gated:
                self.add_module(f"hook_{name}", HookPoint(name, self.asked))
        self._own_operator = self.asked.now = own_operator

    @property
    def requested(self) -> bool:
        """Whether somebody (in this thread) wants what passes one of the points."""
        return any(point.requested for point in self.points())

    def look_again(self) -> None:
        """Let compiled code run the host's own forward again if nothing is asked any more."""
        exposed_or_hooked = any(point.exposed or point.has_hooks() for point in self.points())
        self.asked.now = bool(self.asked.blocks or exposed_or_hooked or self._own_operator)

    @property
    def own_operator(self) -> bool:
        """Whether the library's own recurrence runs in the place of the host's."""
        return self._own_operator or has_own_operator(self)

    def point(self, name: str) -> HookPoint:
        """The hook point of a name, with or without its `hook_`.

        Raises:
            HookError: no such point in this mixer.
        """
        if not isinstance(name, str):
            raise HookError(f"hook points are named by text (x, dt, ..., attn), got {describe(name)}")
        key = name if name.startswith("hook_") else f"hook_{name}"
        if (point := self._modules.get(key)) is not None:
            return point  # type: ignore[return-value]
        if key == "hook_z":
            raise HookError(
                f"layer {self.layer} has no hook_z: in the Mamba-2 family the gate never reaches the operator; "
                "hook the module that applies it (the mixer's `norm`)"
            )
        known = [point.name for point in self.points()]
        near = get_close_matches(name.removeprefix("hook_"), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise HookError(f"no hook point {name!r}{hint} There are {', '.join(known)}")

    def points(self) -> Iterator[HookPoint]:
        """All hook points, in firing order."""
        yield from self._modules.values()  # type: ignore[misc]

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Take every hook off every point, as `HookPoint.reset_hooks` does."""
        for point in self.points():
            point.reset_hooks(including_permanent)
        self.look_again()

    def extra_repr(self) -> str:
        size = f"layer {self.layer}, {self.heads} heads, state size {self.state_size}"
        hooked = [f"{point.name} has {_number(point.hooks)}" for point in self.points() if point.hooks]
        return "; ".join([size, *hooked])
