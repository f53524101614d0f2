"""Pictures in a folder, with one sub-folder per class or without classes."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill.data.base import DistillationDataModule, bytes_to_unit
from lightning_distill.data.pictures import as_shown, files_below, open_picture

__all__ = ["ImageFolder", "find_images"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def find_images(root: str | Path) -> tuple[list[Path], list[int] | None, list[str]]:
    """Picture files under a folder in a fixed order.

    Args:
        root: a folder of pictures, or of one folder per class, which may be nested.

    Returns:
        paths; the class of each, None for a flat folder; the names of the classes, sorted.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no picture.
        ValueError: pictures lie both beside and within class folders.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the image folder {root} does not exist; give ImageFolder(root=...) a folder.")
    paths = files_below(root, _SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no pictures ({', '.join(sorted(_SUFFIXES))}); check ImageFolder(root=...)."
        )
    owners = [p.relative_to(root).parts[0] if p.parent != root else "" for p in paths]
    names = sorted(set(owners))
    if names == [""]:
        return paths, None, []
    if "" in names:
        raise ValueError(
            f"{root} holds pictures beside class folders ({owners.count('')} of {len(paths)}); "
            "move them into a class folder, or give a folder without sub-folders."
        )
    return paths, [names.index(owner) for owner in owners], names


class _Pictures(Dataset[Any]):
    """Map-style pictures: resized on the short side, cropped at the centre."""

    def __init__(self, paths: list[Path], labels: list[int] | None, channels: int, size: int) -> None:
        self.paths, self.labels, self.channels, self.size = paths, labels, channels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

        path = self.paths[index]
        with open_picture(path, str(path)) as file:
            picture = as_shown(file).convert("L" if self.channels == 1 else "RGB")
        x0 = bytes_to_unit(pil_to_tensor(center_crop(resize(picture, self.size), [self.size, self.size])))
        return x0 if self.labels is None else (x0, self.labels[index])


class ImageFolder(DistillationDataModule):
    """Pictures from files, (channels, size, size) in [-1, 1], labelled by class folders.

    They are read as a viewer shows them: upright by their EXIF orientation, what is transparent over white.

    Args:
        root: folder of pictures, or of class folders.
        size: height and width; pictures are resized on their short side and cropped at the centre.
        channels: 3 for colour, 1 for grey.
        sigma_data: standard deviation of the pictures about their per-channel mean.
        **kwargs: arguments of ``DistillationDataModule``; ``num_workers`` reads files in parallel.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: ``channels`` is neither 1 nor 3.
    """

    def __init__(self, root: str, size: int = 64, channels: int = 3, sigma_data: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if channels not in (1, 3):
            raise ValueError(f"ImageFolder(channels={channels}): pictures have 3 channels (colour) or 1 (grey).")
        if size < 1:
            raise ValueError(f"ImageFolder(size={size}): give the height and width in pixels.")
        self.root = root
        self.paths, self.labels, self.class_names = find_images(root)
        self.shape = (channels, size, size)
        self.num_classes = len(self.class_names) or None
        self.sigma_data = sigma_data

    def make_source(self) -> Dataset[Any]:
        """The files."""
        return _Pictures(self.paths, self.labels, self.shape[0], self.shape[1])
