"""A pretended CUDA device: tensors whose values lie on the CPU, and which say that they are on cuda:0.

What CUDA refuses is refused: tensors of two devices in one operation, reading the device's memory from the host. What
the host would wait for is counted, and refused after ``torch.cuda.set_sync_debug_mode("error")``, as CUDA itself does.
Operations and uploads are counted by the function that asks for them. Values are right, so that results can be compared
with the CPU's. Not pretended: streams, memory, TF32, and how cuBLAS rounds.

A device without values (``pretended_cuda(META)``) has shapes alone, so that models of any size are on it at once. What
is read from it are zeros, and true.
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from causalcone.kernels.backends import FusedOperation

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
MEMORY = 80 * 2**30

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount", "histc", "linalg_cholesky", "linalg_inv", "_linalg_check_errors", "_linalg_svd",
    "_linalg_eigh",
}  # fmt: skip
"""Operations whose results the host needs to go on, or of which it checks that they succeeded."""

WITHOUT_WORK = {
    "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "permute", "alias",
    "detach", "split", "split_with_sizes", "unbind", "unflatten", "as_strided", "diagonal", "lift_fresh", "unfold",
    "_reshape_alias", "set_", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_",
    "is_same_size", "sym_size", "sym_stride", "sym_numel", "_conj", "_neg_view",
}  # fmt: skip
"""Operations that launch nothing."""

TAKE_HOST_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill_", "index_put_", "index_put", "_index_put_impl_"}
"""Operations, besides elementwise ones, that take a tensor of the host where it is a single number."""


def _addmm_activation(bias, rows, weight, use_gelu=False):
    product = torch.addmm(bias, rows, weight)
    return torch.nn.functional.gelu(product, approximate="tanh") if use_gelu else product.relu()


OF_CUDA = {"_addmm_activation": _addmm_activation}
"""Operations whose values are others on CPUs."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Counts:
    """What the device was asked for: operations, waits and uploads, by name and the function that asked. ``hear`` is
    told of each as it comes: the name, what the operation was given, and what it gave. ``home``: where values lie."""

    def __init__(self):
        self.operations, self.waits, self.uploads, self.strict = Counter(), Counter(), Counter(), False
        self.stopped, self.home, self.hear = False, CPU, None

    def reset(self):
        for counter in (self.operations, self.waits, self.uploads):
            counter.clear()

    @contextmanager
    def stop(self):
        """Within it nothing is counted."""
        self.stopped, before = True, self.stopped
        yield
        self.stopped = before

    def operation(self, name, given=(), made=None):
        if not self.stopped:
            self.operations[name, asking()] += 1
            self._tell(name, given, made)

    def wait(self, reason):
        if self.stopped:
            return
        self.waits[reason, asking()] += 1
        self._tell("wait", (), None)
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {reason}, in {asking()}")

    def upload(self, host):
        if not self.stopped:
            self.uploads["pinned" if pinned(host) else "pageable", asking()] += 1
            self._tell("upload", (host,), None)

    def _tell(self, name, given, made):
        if self.hear:
            self.hear(name, given, made)


def asking():
    """The innermost function of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("causalcone"):
            return f"{name.removeprefix('causalcone.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "the test"


COUNTS = Counts()


class DeviceTensor(Tensor):
    """A tensor of the pretended device, with its ``values`` on the CPU."""

    __slots__ = ["values"]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        values = values.detach() if values.requires_grad else values
        with torch.inference_mode(values.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
                layout=values.layout, device=CPU, requires_grad=requires_grad,
            )  # fmt: skip
        made.values = values
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def __repr__(self):
        return f"DeviceTensor({self.values!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = DeviceTensor(self.values.detach().clone(), self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter(self) else made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def is_parameter(tensor):
    return isinstance(tensor, torch.nn.Parameter) or getattr(tensor, "_is_param", False)


def values_of(value):
    return value.values if isinstance(value, DeviceTensor) else value


def as_device_tensor(value):
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


def put(host):
    """A copy on the device."""
    return DeviceTensor(host.detach().clone() if COUNTS.home == CPU else host.detach().to(META))


def read(tensor):
    """A copy of its values on the host."""
    values = tensor.values.detach()
    if COUNTS.home == CPU:
        return values.clone()
    return torch.full(values.shape, values.dtype == torch.bool, dtype=values.dtype, device=CPU)


def pinned(host):
    return getattr(host, "_pinned", False)


def tensors_in(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_view(function):
    return any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)


def dispatch(function, args, kwargs):
    """One operation: refused, counted, computed on the values."""
    name = function.overloadpacket.__name__
    if name == "cat" and torch._C._current_graph_task_id() >= 0:
        args = [[zeros_of_autograd(part) for part in args[0]], *args[1:]]
    if any(not isinstance(tensor, DeviceTensor) for tensor in tensors_in(args, kwargs)):
        check_devices(function, name, args, kwargs)
    if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        COUNTS.wait("mask as index")
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 2):
        COUNTS.wait(name)
    host_args, host_kwargs = tree_map(values_of, (args, kwargs))
    if host_kwargs.get("device") is not None:
        host_kwargs["device"] = COUNTS.home
    if name == "_local_scalar_dense":
        return read(args[0]).item()
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        host_args = args[0], read(args[1])
    result = OF_CUDA.get(name, function)(*host_args, **host_kwargs)
    if name not in WITHOUT_WORK and not is_view(function):
        COUNTS.operation(name, (args, kwargs), result)
    if function._schema.is_mutable:
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(function._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if not function._schema.returns:
            return None
        return written[0] if len(function._schema.returns) == 1 else tuple(written)
    return tree_map(as_device_tensor, result)


def zeros_of_autograd(part):
    """The way back from ``split`` makes zeros for parts that nothing depends on, where it takes the values to be."""
    if isinstance(part, DeviceTensor) or (COUNTS.home == CPU and part.any()):
        return part
    COUNTS.operation("zeros", (), part)
    return DeviceTensor(part)


def check_devices(function, name, args, kwargs):
    """Refuse tensors of the host in an operation of the device, but where CUDA takes them."""
    found = tensors_in(args, kwargs)
    if name in ("copy_", "_copy_from"):
        target, source = args[:2]
        host = source if isinstance(target, DeviceTensor) else target
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) or not pinned(host)
        if host is source:
            COUNTS.upload(source)
        if waits:
            COUNTS.wait("a copy between host and device")
        return
    if name in INDEXING and isinstance(args[0], DeviceTensor):
        if any(index is not None and not isinstance(index, DeviceTensor) for index in args[1]):
            COUNTS.wait("an index of the host")
        found = tensors_in(args[2:])
    hosts = [tensor for tensor in found if not isinstance(tensor, DeviceTensor)]
    numbers = torch.Tag.pointwise in function.tags or name in TAKE_HOST_NUMBERS
    if hosts and not (numbers and all(tensor.dim() == 0 for tensor in hosts)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})")


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, host):
        return put(host)

    @staticmethod
    def backward(ctx, gradient):
        COUNTS.wait("a gradient to the host")
        return read(gradient)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return read(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return put(gradient)


def to_device(host, non_blocking=False):
    COUNTS.upload(host)
    if not (non_blocking and pinned(host)):
        COUNTS.wait("a copy from the host")
    if torch.is_grad_enabled() and host.requires_grad:
        return _ToDevice.apply(host)
    return put(host)


def to_host(tensor):
    COUNTS.wait("a copy to the host")
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _ToHost.apply(tensor)
    return read(tensor)


def is_cuda(device):
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def pin(tensor):
    if isinstance(tensor, DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    made = tensor.clone()  # differentiable, as pinning is
    made._pinned = True
    return made


def to_numpy(tensor, *args, **kwargs):
    if isinstance(tensor, DeviceTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return Tensor.numpy(tensor, *args, **kwargs)


def to_list(tensor):
    if isinstance(tensor, DeviceTensor):
        COUNTS.wait("tolist")
        tensor = read(tensor)
    return tensor.tolist()


def set_data(tensor, data):
    if isinstance(tensor, DeviceTensor) != isinstance(data, DeviceTensor):
        raise RuntimeError("incompatible tensor type: data of another device")
    SET_DATA(tensor, data)
    if isinstance(data, DeviceTensor):
        tensor.values = data.values


def to(tensor, *args, **kwargs):
    """``Tensor.to``; a change of dtype between devices happens where the tensor comes from."""
    device, dtype, non_blocking = (
        kwargs.pop("device", None),
        kwargs.pop("dtype", None),
        kwargs.pop("non_blocking", False),
    )
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            non_blocking = value
        elif value is not None:
            device = value
    dtype = dtype or tensor.dtype
    if device is None or (is_cuda(device) == isinstance(tensor, DeviceTensor) and torch.device(device).type != "meta"):
        return Tensor.to(tensor, dtype, **kwargs)
    if torch.device(device).type == "meta":
        return Tensor.to(values_of(tensor), "meta", dtype)
    if dtype != tensor.dtype:
        tensor = Tensor.to(tensor, dtype)
    return to_device(tensor, non_blocking) if is_cuda(device) else to_host(tensor)


SET_DATA = Tensor.data.__set__
METHODS = {
    Tensor.to: to,
    Tensor.cuda: lambda tensor, *_: tensor if isinstance(tensor, DeviceTensor) else to_device(tensor),
    Tensor.cpu: lambda tensor: to_host(tensor) if isinstance(tensor, DeviceTensor) else tensor,
    Tensor.pin_memory: pin,
    Tensor.is_pinned: pinned,
    Tensor.numpy: to_numpy,
    Tensor.__array__: to_numpy,
    Tensor.tolist: to_list,
    SET_DATA: set_data,
    Tensor.data_ptr: lambda tensor: Tensor.data_ptr(values_of(tensor)),
    Tensor.untyped_storage: lambda tensor: Tensor.untyped_storage(values_of(tensor)),
    Tensor.__repr__: lambda tensor, **_: repr(values_of(tensor)),
}


class OnDevice(TorchFunctionMode):
    """Sends what is made for the device there, and sees what crosses between it and the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in METHODS:
            return METHODS[function](*args, **kwargs)
        pinning = kwargs.pop("pin_memory", False)
        device = kwargs.pop("device", None)
        if pinning and is_cuda(device):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if device is None:
            made = function(*args, **kwargs)
        elif not is_cuda(device):
            made = function(*tree_map(values_of, args), device=device, **kwargs)
        elif function in (torch.tensor, torch.as_tensor):
            made = function(*args, **kwargs)
            return made if isinstance(made, DeviceTensor) else to_device(made)
        else:
            values = function(*tree_map(values_of, args), device=COUNTS.home, **kwargs)
            made = as_device_tensor(values)
            if function.__name__ not in WITHOUT_WORK:
                COUNTS.operation(function.__name__, (), made)
            return made.requires_grad_() if values.requires_grad else made
        if pinning:
            made._pinned = True
        return made


class _Event:
    """Waiting for one is meant, and not counted; where nothing was asked for since, it is a wait for all, and told."""

    before = -1

    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        self.before = sum(COUNTS.operations.values())

    def synchronize(self):
        if self.before == sum(COUNTS.operations.values()):
            COUNTS._tell("wait", (), None)

    def elapsed_time(self, other):
        return 0.0


class _Stream(_Event):
    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def _strictly(mode):
    COUNTS.strict = mode in ("error", 2)


def _nothing(*_, **__):
    pass


CUDA_FUNCTIONS = {
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
    "is_initialized": lambda: True, "init": _nothing, "_lazy_init": _nothing, "synchronize": _nothing,
    "empty_cache": _nothing, "set_device": _nothing,
    "manual_seed": _nothing, "manual_seed_all": _nothing, "reset_peak_memory_stats": _nothing,
    "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
    "mem_get_info": lambda *_: (MEMORY // 2, MEMORY), "get_device_name": lambda *_: "a pretended device",
    "get_device_capability": lambda *_: (9, 0), "current_stream": lambda *_: _Stream(), "Event": _Event,
    "Stream": _Stream, "device": lambda *_: nullcontext(), "stream": lambda *_: nullcontext(),
    "set_sync_debug_mode": _strictly, "get_sync_debug_mode": lambda: 2 if COUNTS.strict else 0,
    "_is_in_bad_fork": lambda: False,
    "get_device_properties": lambda *_: SimpleNamespace(
        name="a pretended device", total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, warp_size=32
    ),
}  # fmt: skip

KERNELS = {
    "gathering": ("_add", "_gather"), "log_sums": ("_add_tile",), "row_attention": ("_attend",), "adam": ("_step",),
    "rotary": ("_turn",), "gating": ("_gate",),
}  # fmt: skip


class _Launcher:
    """Stands for a Triton kernel, whose tensors have all to be of the device. It computes nothing: the interpreter
    takes seconds for what ``in_torch`` computes in the plain form."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            if any(not isinstance(tensor, DeviceTensor) for tensor in tensors_in(args)):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            COUNTS.operation("triton" + self.name, (grid, args, kwargs))

        return launch


def in_torch(operation, *args):
    """A fused operation: its launches are checked, and its plain form computes."""
    fused, plain = (import_module(f"causalcone.kernels.{where}{operation.module}") for where in ("fused.", ""))
    steps = getattr(args[0], "steps", None)
    made = getattr(fused, operation.name)(*args)
    if COUNTS.home == META:
        return made
    if steps is not None:
        args[0].steps = steps  # the plain form counts its step itself
    with COUNTS.stop():
        return getattr(plain, operation.name)(*args)


@contextmanager
def pretended_cuda(home=CPU):
    """Within it this process has a CUDA device, whose values lie on ``home``; gives what is counted."""
    submit, save, apply = ThreadPoolExecutor.submit, torch.save, torch.nn.Module._apply

    def submit_within(self, function, *args, **kwargs):
        def within():
            with OnDevice():
                return function(*args, **kwargs)

        return submit(self, within)

    def save_values(value, *args, **kwargs):
        return save(tree_map(values_of, value), *args, **kwargs)

    def apply_and_tie(self, function, recurse=True):
        """Parameters are replaced, so that a head that shares the embedding's weight has to be given it again."""
        made = apply(self, function, recurse)
        if recurse and getattr(getattr(self, "config", None), "tie_word_embeddings", False):
            head = self.get_output_embeddings() if hasattr(self, "get_output_embeddings") else None
            if head is not None:
                head.weight = self.get_input_embeddings().weight
        return made

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    COUNTS.reset()
    COUNTS.strict, COUNTS.home, COUNTS.hear = False, home, None
    with ExitStack() as stack:
        for name, function in CUDA_FUNCTIONS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submit_within))
        stack.enter_context(mock.patch.object(torch, "save", save_values))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", apply_and_tie))
        for module, names in KERNELS.items():
            fused = import_module(f"causalcone.kernels.fused.{module}")
            for name in names:
                stack.enter_context(mock.patch.object(fused, name, _Launcher(name)))
        stack.enter_context(mock.patch.object(FusedOperation, "__call__", in_torch))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.enter_context(OnDevice())
        yield COUNTS
