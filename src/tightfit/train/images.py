"""Image classification: arrays from npz and IDX files or a data set's images, prepared in the collator."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tightfit.core.errors import DataError, RecipeError
from tightfit.train.encode import fingerprint, required_column
from tightfit.train.labels import class_labels
from tightfit.train.rows import Rows
from tightfit.train.sources import read_sources, split_off

if TYPE_CHECKING:
    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import RecipeFile

PROCESSOR_FILE = "preprocessor_config.json"
_SPLITS = {"train": ("train_", ""), "eval": ("eval_", "test_", "val_", "")}


@dataclass(frozen=True)
class ImageProcessor:
    """Size and scale of a vision model's input, and the collator's arithmetic."""

    height: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    config_file: str | None = None

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (rows, height, width, channels) -> float (rows, channels, height, width) as the model wants it."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        if pixels.shape[1] != self.channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if pixels.shape[2:] != (self.height, self.width):
            pixels = torch.nn.functional.interpolate(
                pixels, (self.height, self.width), mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()

    def save_pretrained(self, folder: str | Path) -> None:
        """Put the model's own preprocessor_config.json into the folder, if it has one."""
        if self.config_file:
            shutil.copyfile(self.config_file, Path(folder) / PROCESSOR_FILE)


def build_processor(path: str) -> ImageProcessor:
    """Read size, mean and std from preprocessor_config.json, the rest from config.json."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        file = cached_file(path, PROCESSOR_FILE, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"model: {path}: no config could be read: {reason}") from error
    size = getattr(config, "image_size", None)
    settings: dict[str, Any] = {}
    if file:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        size = size or settings.get("crop_size") or settings.get("size")
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    if size is None or (isinstance(size, tuple) and None in size):
        raise RecipeError(f"model: {path}: tells no image_size; accepted are models with a fixed image size")
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return ImageProcessor(
        height=height,
        width=width,
        channels=getattr(config, "num_channels", 3),
        mean=tuple(settings.get("image_mean") or (0.5,)),
        std=tuple(settings.get("image_std") or (0.5,)),
        config_file=file,
    )


@dataclass(frozen=True)
class ImageCollator:
    """Stack uint8 images and prepare them as the model wants them."""

    processor: ImageProcessor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = np.stack([np.asarray(row["pixel_values"], dtype=np.uint8) for row in rows])
        return {
            "pixel_values": self.processor(images),
            "labels": torch.tensor([int(row["labels"]) for row in rows]),
        }


def load_images(file: RecipeFile, processor: ImageProcessor) -> TaskData:
    """Rows of image-classification: npz (`train_images`, `train_labels`, ...), IDX pairs, or a data set's images.

    An npz file may hold both splits and `class_names`. IDX labels are looked for beside the images, under the
    same name with `labels-idx1` for `images-idx3`.
    """
    from datasets import Array3D, Dataset, Features, Value

    from tightfit.train.data import TaskData

    train, held_out, notes = _splits(file, processor)
    image, label = _columns(file, train)
    if held_out is None:
        strata = [str(value) for value in train.column(label)]
        train, held_out, note = split_off(train, file.data.eval_fraction, file.data.eval_rows, strata)
        notes.append(note)
    labels = class_labels(train, held_out, label)
    names = labels.names or ()
    sets, digests = {}, []
    for rows, targets in ((train, labels.train), (held_out, labels.eval)):
        images = np.stack(rows.column(image))
        given, wanted = images.shape[-1], processor.channels
        if given not in (1, wanted) and (given, wanted) != (3, 1):
            raise DataError(
                f"{rows.source}: images of shape {images.shape[1:]} have {given} channels (the last dimension), the "
                f"model takes {wanted}"
            )
        digests.append([fingerprint(images.tobytes().hex()), targets])
        features = Features({"pixel_values": Array3D(images.shape[1:], "uint8"), "labels": Value("int64")})
        columns = {"pixel_values": list(images), "labels": targets}
        sets[id(rows)] = Dataset.from_dict(columns, features=features).with_format("numpy")
    return TaskData(
        task=file.task,
        train=sets[id(train)],
        eval=sets[id(held_out)],
        collator=ImageCollator(processor),
        fingerprint=fingerprint(file.task, digests),
        label_names=names,
        num_labels=len(names),
        problem_type="single_label_classification",
        notes=tuple(notes),
    )


def _columns(file: RecipeFile, rows: Rows) -> tuple[str, str]:
    if set(rows.columns) == {"images", "labels"}:
        return "images", "labels"
    return required_column(file, "text", rows)[0], required_column(file, "label", rows)


def _splits(file: RecipeFile, processor: ImageProcessor) -> tuple[Rows, Rows | None, list[str]]:
    section = file.data
    if not _is_array_file(section.train):
        train, held_out, notes = read_sources(section)
        column = required_column(file, "text", train)[0]
        for rows in [train] + ([held_out] if held_out else []):
            rows.columns[column] = [
                _sized(value, processor, rows, i, column) for i, value in enumerate(rows.column(column))
            ]
        return train, held_out, notes
    train = _read_arrays(section.train, "train", section.rows)
    if section.eval is not None:
        return train, _read_arrays(section.eval, "eval", section.eval_rows), []
    if section.train.endswith(".npz"):
        with np.load(Path(section.train).expanduser(), allow_pickle=False) as arrays:
            found = next((p for p in _SPLITS["eval"] if p and f"{p}images" in arrays), None)
        if found:
            note = f"eval rows are {found}images of {section.train}"
            return train, _read_arrays(section.train, "eval", section.eval_rows), [note]
    return train, None, []


def _sized(value: Any, processor: ImageProcessor, rows: Rows, row: int, column: str) -> np.ndarray:
    if not hasattr(value, "convert"):
        raise DataError(f"{rows.place(row, column)}: got {type(value).__name__}, accepted is an image")
    return np.asarray(value.convert("RGB").resize((processor.width, processor.height)), dtype=np.uint8)


def _is_array_file(name: str) -> bool:
    return name.endswith(".npz") or "ubyte" in Path(name).name


def _read_arrays(name: str, split: str, limit: int | None) -> Rows:
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{name}: no such data file")
    classes: dict[str, tuple[str, ...]] = {}
    if name.endswith(".npz"):
        images, labels, names = _read_npz(path, name, split)
        if names is not None:
            if labels.dtype.kind not in "iu":
                raise DataError(f"{name}: got labels of {labels.dtype}, beside class_names accepted are whole numbers")
            if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
                raise DataError(f"{name}: labels reach {labels.max()}, class_names has {len(names)} names")
            classes, labels = {"labels": names}, np.array(names)[labels]
    else:
        images = _read_idx(path, name, 3)
        label_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        if label_path == path or not label_path.is_file():
            raise DataError(f"{name}: no labels beside it, looked for {label_path.name}")
        labels = _read_idx(label_path, str(label_path), 1)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1] or not images.size:
        raise DataError(
            f"{name}: got images {images.dtype} {images.shape} and labels {labels.shape}, accepted is uint8 "
            f"(rows, height, width[, channels]) and as many labels"
        )
    images, labels = images[:limit], labels[:limit]
    columns = {"images": list(images), "labels": labels.tolist()}
    return Rows(name, columns, range(1, len(images) + 1), unit="row", classes=classes)


def _read_npz(path: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prefix = next((p for p in _SPLITS[split] if f"{p}images" in arrays and f"{p}labels" in arrays), None)
            if prefix is None:
                wanted = " or ".join(f"{p}images with {p}labels" for p in _SPLITS[split])
                raise DataError(f"{name}: no {wanted}; its arrays are {', '.join(arrays.files)}")
            names = tuple(str(n).strip() for n in arrays["class_names"]) if "class_names" in arrays else None
            return arrays[f"{prefix}images"], arrays[f"{prefix}labels"], names
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: not a readable npz file: {error}") from None


def _read_idx(path: Path, name: str, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{name}: not an IDX file of unsigned bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{name}: holds {values.size} values, its header says {shape}")
    return values.reshape(shape)
