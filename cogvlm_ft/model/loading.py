"""Model folders: config.json + safetensors (one file or an index) + tokenizer.model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import initialization

from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.model.cogvlm import CogVLMForCausalLM
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.decoder import inverse_frequencies
from cogvlm_ft.model.quantized import SCALE, replace_linears
from cogvlm_ft.model.split import allocate_on
from cogvlm_ft.plain_files import read_bytes, read_json, sync
from cogvlm_ft.safetensors_io import TensorSpec, write_tensors
from cogvlm_ft.settings import Config
from cogvlm_ft.terminal import progress_bar

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
POSITION_TABLE = "model.vision.patch_embedding.position_embedding.weight"
MAX_FILE_BYTES = 5 * 2**30
MAX_CONFIG_BYTES = 2**24
MAX_NAME_BYTES = 256
CPU = torch.device("cpu")
_FLOATS = ("F32", "BF16", "F16", "F64")
READ_ELEMENTS = 2**22  # at a time: 16 MiB of fp32

# Read slices of the first dimension: fetch(start, stop) -> float[stop - start, ...]
Fetch = Callable[[int, int], Tensor]
# Store a parameter by its name: assign(name, fetch, number of rows)
Assign = Callable[[str, Fetch, int], None]


class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> torch.Size: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Read elements start to stop of the flattened tensor."""


Weight = StoredTensor | Tensor


def model_config_of(config: Config) -> CogVLMConfig:
    """Return the config of the model that a run trains: that of `model.path` with the run's resolution and resizing."""
    return load_config(config.model.folder, config.model.image_size, config.data.resize)


def load_config(folder: str | Path, image_size: int | None = None, resize: str | None = None) -> CogVLMConfig:
    """Return the folder's config, for inputs of `image_size` pixels and one of `config.RESIZES` if these are given."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json found; expected a model folder")
    config = read_config(folder / "config.json")
    if image_size is not None and image_size != config.image_size:
        try:
            config = config.at_image_size(image_size)
        except ValueError as error:
            raise ConfigError(f"model.image_size: {error}") from error
    if resize is not None:
        config.image_resize = resize  # saved with the weights, in their config.json
    return config


def read_config(file: Path) -> CogVLMConfig:
    """Return the config in a config.json. Raises CheckpointError."""
    try:
        read_json(file, MAX_CONFIG_BYTES)
        config = CogVLMConfig.from_pretrained(file)
        config.check_sizes()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = "expected JSON as the published model folder has it. Download it again"
        raise CheckpointError(f"{file}: {error}; {expected}") from None
    return config


def load_model(
    folder: str | Path,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    resize: str | None = None,
    device: torch.device = CPU,
) -> CogVLMForCausalLM:
    """Load a whole model into this process, tensor by tensor; raise CheckpointError naming all keys that do not fit.

    device: where its memory is.
    """
    model = allocate_model(load_config(folder, image_size, resize), dtype, [device])
    parameters = list(model.named_parameters())
    load_weights(folder, parameter_shapes(parameters), whole_assign(parameters))
    return model


def allocate_model(
    config: CogVLMConfig,
    dtype: torch.dtype,
    devices: Sequence[torch.device] = (CPU,),
    quantized: str | None = None,
    kept: Iterable[str] = (),
) -> CogVLMForCausalLM:
    """Allocate a model for evaluation whose weights are read later, at once on its devices and in its dtype.

    quantized: a kind of model/quantized.py for its linear layers; None: as they are. kept: modules that stay as they
    are in any case.
    """
    with initialization.no_init_weights(), torch.device("meta"):
        model = CogVLMForCausalLM(config)
    nn.Module.to(model, dtype)
    if quantized:
        replace_linears(model, quantized, kept)
    allocate_on(model, devices)
    for name, buffer in model.named_buffers():
        if name.endswith(".inv_freq"):
            buffer.copy_(inverse_frequencies(2 * len(buffer)))
    return model.eval()


def whole_assign(parameters: Iterable[tuple[str, Tensor]]) -> Assign:
    """Return a function that reads whole tensors into parameters that are not partitioned."""
    by_name = dict(parameters)

    def assign(name: str, fetch: Fetch, num_rows: int) -> None:
        by_name[name].data.copy_(fetch(0, num_rows))

    return assign


def load_weights(folder: str | Path, expected: dict[str, tuple[int, ...]], assign: Assign) -> None:
    """Call `assign(name, fetch, num_rows)` for every expected parameter, each read lazily from its mapped file.

    A position table of another resolution is interpolated. inv_freq buffers in the files are ignored: they
    are computed.
    """
    with ExitStack() as stack:
        slices = _open_slices(Path(folder), stack)
        shapes = {key: tuple(view.get_shape()) for key, view in slices.items() if not key.endswith(".inv_freq")}
        check_keys(folder, expected, shapes)
        for name, shape in progress_bar(expected.items(), desc="load weights", unit="tensor"):
            if name == POSITION_TABLE and shapes[name] != shape:
                table = interpolate_position_embedding(slices[name][:], shape[0])
                assign(name, lambda start, stop, table=table: table[start:stop], shape[0])  # type: ignore[misc]
            else:
                assign(name, lambda start, stop, view=slices[name]: view[start:stop], shape[0])  # type: ignore[misc]


def _open_slices(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Return key -> safetensors slice (a view into the mapped file)."""
    slices: dict[str, Any] = {}
    for path in weight_files(folder):
        file = stack.enter_context(_open(path))
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        _check_once(path, slices, found)
        slices |= found
    check_floats(folder, {key: view.get_dtype() for key, view in slices.items()})
    return slices


def _check_once(path: Path, earlier: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raise CheckpointError if a file holds a tensor that an earlier one of its folder holds too."""
    twice = sorted(earlier.keys() & found.keys())
    if twice:
        raise CheckpointError(
            f"{path}: found {twice[0]}, which is in another file too; expected each once. Download it again"
        )


def check_floats(source: Path, dtypes: Mapping[str, str]) -> None:
    """Raise CheckpointError for weights of another type, unless they are quantised here and have their scales."""
    other = next((name for name, dtype in dtypes.items() if dtype not in _FLOATS), None)
    if other is not None and not any(name.endswith(SCALE) for name in dtypes):
        raise CheckpointError(
            f"{source}: found {other} as {dtypes[other]}; expected one of {', '.join(_FLOATS)}. Give the model that it "
            "was converted from"
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: found {path.stat().st_size} bytes that are not a complete safetensors file ({error}). "
            "Download it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder."""
    if (folder / INDEX_FILE).is_file():
        names = _indexed_files(folder / INDEX_FILE)
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise CheckpointError(
            f"{folder}: found {found}; expected {SINGLE_FILE} or {INDEX_FILE}. Pickled .bin files are not opened. "
            "Convert them once: put the tensors of every `torch.load(file, weights_only=True)` into one dict, then "
            f'`safetensors.torch.save_file(tensors, "{SINGLE_FILE}", {{"format": "pt"}})`'
        )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX_FILE}: found {name!r}; expected a file in that folder")
    return [folder / name for name in names]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file.

    The file is mapped only while a part of it is read. Otherwise everything read so far would count as used memory.
    """

    path: Path
    name: str
    shape: torch.Size
    dtype: str

    def read(self, start: int, stop: int) -> Tensor:
        """Read elements start to stop of the flattened tensor, in the dtype of the file."""
        width = math.prod(self.shape[1:])
        first = start // width
        with _open(self.path) as file:
            rows = file.get_slice(self.name)[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]


def open_tensors(folder: Path) -> dict[str, FileTensor]:
    """Open all tensors of a model folder by name, buffers included; raise CheckpointError for a damaged file."""
    tensors: dict[str, FileTensor] = {}
    for path in weight_files(folder):
        found = open_file(path)
        _check_once(path, tensors, found)
        tensors |= found
    check_floats(folder, {name: tensor.dtype for name, tensor in tensors.items()})
    return tensors


def open_file(path: Path) -> dict[str, FileTensor]:
    """Open the tensors of one safetensors file by name; raise CheckpointError if it is damaged."""
    with _open(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: FileTensor(path, name, torch.Size(view.get_shape()), view.get_dtype()) for name, view in views.items()
        }


def read_whole(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Read a whole tensor, holding in memory besides it only the part being read.

    A tensor in memory is returned as it is if its dtype fits.
    """
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    whole = torch.empty(weight.shape, dtype=dtype, device="cpu")
    flat = whole.view(-1)
    for start in range(0, len(flat), READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, len(flat))
        flat[start:stop] = weight.read(start, stop)
    return whole


def _indexed_files(index: Path) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(len(os.fsencode(name)) < MAX_NAME_BYTES for name in names):
            raise ValueError("a name that no file has")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no readable weight_map ({error!r}). Download it again") from error


def check_keys(source: str | Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise a CheckpointError that lists every missing, unexpected and mis-shaped tensor of `source`."""
    if any(key.endswith(SCALE) for key in found.keys() - expected.keys()):
        raise CheckpointError(
            f"{source}: found quantised weights; expected floats. Give the model that it was exported from"
        )
    problems = [f"missing {key} {list(expected[key])}" for key in expected.keys() - found.keys()]
    problems += [f"unexpected {key} {list(found[key])}" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        if expected[key] != found[key] and not (key == POSITION_TABLE and _can_interpolate(found[key], expected[key])):
            problems.append(f"{key} has shape {list(found[key])}; expected {list(expected[key])}")
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit its config.json:\n  " + "\n  ".join(sorted(problems)))


def _can_interpolate(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether the table has a cls row, a square grid, and rows of the expected width."""
    return found[1:] == expected[1:] and found[0] > 1 and math.isqrt(found[0] - 1) ** 2 == found[0] - 1


def interpolate_position_embedding(table: Tensor, num_positions: int) -> Tensor:
    """Interpolate float[1 + g * g, H] to float[num_positions, H]: cls row kept, grid resized by bicubic interpolation.

    align_corners False, no antialias, by size: this is how the published 490 px checkpoints were made from 224 px.
    """
    old, new = round((len(table) - 1) ** 0.5), round((num_positions - 1) ** 0.5)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.flatten(2)[0].T])


def read_remote_code(folder: str | Path) -> dict[str, bytes]:
    """Read a published folder's own *.py, to be copied for programs that run them; this package never does."""
    return {path.name: read_bytes(path) for path in Path(folder).glob("*.py") if path.is_file()}


def parameter_shapes(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Return full shapes, also of parameters that ZeRO-3 has partitioned."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


def save_weights(
    folder: str | Path,
    tensors: Iterable[tuple[str, Weight]],
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write safetensors files of at most `max_file_bytes` (a larger tensor gets its own) and, if several, their index.

    A stored tensor is read when it is written, and freed before the next. The files are synced to disk on return.
    """
    folder = Path(folder)
    files = _split_into_files(list(tensors), dtype, max_file_bytes)
    total_bytes = sum(_num_bytes(weight, dtype) for contents in files for _, weight in contents)
    weight_map: dict[str, str] = {}
    with progress_bar(desc="write weights", unit="B", total=total_bytes) as bar:
        for number, contents in enumerate(files, 1):
            name = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            specs = [TensorSpec(key, tuple(weight.shape), dtype) for key, weight in contents]
            write_tensors(folder / name, specs, _read_in_turn(contents, dtype, bar))
            weight_map.update({key: name for key, _ in contents})
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync(folder / INDEX_FILE)


def _read_in_turn(contents: Sequence[tuple[str, Weight]], dtype: torch.dtype, bar: tqdm) -> Iterator[Tensor]:
    for _, weight in contents:
        yield read_whole(weight, dtype)
        bar.update(_num_bytes(weight, dtype))


def _split_into_files(
    tensors: Sequence[tuple[str, Weight]], dtype: torch.dtype, max_file_bytes: int
) -> list[list[tuple[str, Weight]]]:
    """Assign the tensors to files."""
    files: list[list[tuple[str, Weight]]] = [[]]
    num_bytes = 0
    for key, weight in tensors:
        if files[-1] and num_bytes + _num_bytes(weight, dtype) > max_file_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append((key, weight))
        num_bytes += _num_bytes(weight, dtype)
    return files


def _num_bytes(weight: Weight, dtype: torch.dtype) -> int:
    return math.prod(weight.shape) * dtype.itemsize
