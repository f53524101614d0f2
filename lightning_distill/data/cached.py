"""Training from stores: text embeddings alone, or latents with their embeddings (see ``lightning-distill cache``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill.batch import Batch
from lightning_distill.data.base import DistillationDataModule, Scaling, _OneBatch, check_scaling
from lightning_distill.data.buckets import BucketLoader
from lightning_distill.data.checksums import verify_stores
from lightning_distill.data.loader import ResumableLoader, epoch_generator
from lightning_distill.data.shards import difference, read_header
from lightning_distill.data.store import Store, is_store, record_weight
from lightning_distill.networks.autoencoders import autoencoder_identity
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.networks.text import text_digest

__all__ = ["CachedConditions", "CachedLatents", "StoreSource", "check_alike", "open_stores"]

_LATENTS = "x0"
#: what the keys of stores in one folder may differ in
_OF_ONE_STORE = ("size", "records")


def open_stores(path: str | Path) -> list[Store]:
    """The store in a folder, or one per size where the folder holds several.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a store is not complete, or they hold different tensors, or those of different encoders.
    """
    path = Path(path).expanduser()
    folders = [path] if is_store(path) else sorted(p for p in path.glob("*") if is_store(p))
    if not folders:
        raise FileNotFoundError(
            f"{path} holds no store; write one with lightning-distill cache --pipeline FOLDER --prompts FILE --out "
            f"{path}."
        )
    stores = [Store(folder) for folder in folders]
    check_alike(folders)
    for store in stores[1:]:
        if store.names != stores[0].names:
            raise ValueError(
                f"the stores {stores[0].folder} and {store.folder} hold different tensors "
                f"({', '.join(stores[0].names)}; {', '.join(store.names)}); write both with the same command."
            )
    return stores


def check_alike(folders: Sequence[Path], key: Mapping[str, Any] | None = None) -> None:
    """Refuse stores in one folder that other encoders, or other settings, made.

    Args:
        folders: of stores.
        key: what they all should have been made with, but for size and records; None is what the first was.

    Raises:
        ValueError: a store was made with something else.
    """
    for folder in folders:
        own = read_header(folder)["key"]
        key = own if key is None else key
        theirs, ours = ({k: v for k, v in which.items() if k not in _OF_ONE_STORE} for which in (own, key))
        if (differing := difference(theirs, ours)) is not None:
            name, found, wanted = differing
            raise ValueError(
                f"{folder} holds a store with {name}={found}, not {wanted}; stores in one folder are trained on "
                "together, so write those of other encoders or settings to another folder."
            )


class StoreSource:
    """A ``Source`` over one or several stores, drawn by the weights of their records.

    An epoch has as many places as there are records, and each store a share of them by the sum of its weights. Of a
    store's n places with weights w, place j holds the record in whose interval of the cumulated weights
    (j + u_epoch) sum(w) / n lies. So a record comes n w / sum(w) times, rounded down or up, in every epoch.

    Args:
        stores: of one size each, in order; those whose records all have the weight 0 are left out.
        keys: conditions wanted.
        latents: give out ``x0`` too.
        seed: of u.

    Attributes:
        stores: those that are drawn from.
        sizes: number of places of each.

    Raises:
        ValueError: every record has the weight 0.
    """

    def __init__(self, stores: list[Store], keys: list[str], latents: bool, seed: int = 0) -> None:
        self.keys, self.latents, self.seed = keys, latents, seed
        every = [store.facts(range(len(store))) for store in stores]
        kept = [i for i, facts in enumerate(every) if any(record_weight(fact) > 0 for fact in facts)]
        if not kept:
            raise ValueError(f"every record of {stores[0].folder} has the weight 0, so none can be drawn.")
        self.stores, facts = [stores[i] for i in kept], [every[i] for i in kept]
        #: text of every record, in the order of the stores; empty where none was written
        self.prompts = [fact.get("prompt", "") for of_store in facts for fact in of_store]
        weights = [torch.tensor([record_weight(fact) for fact in of_store], dtype=torch.float64) for of_store in facts]
        self.sizes = _shares([float(w.sum()) for w in weights], sum(map(len, weights)))
        #: cumulated weights; None where every record has a place of its own
        self._cumulated = [
            None if size == len(w) and bool((w == w[0]).all()) else w.cumsum(0) for w, size in zip(weights, self.sizes)
        ]
        self._places = torch.tensor([0, *self.sizes]).cumsum(0)
        self._starts = torch.tensor([0, *map(len, weights)]).cumsum(0)

    def __len__(self) -> int:
        return int(self._places[-1])

    def records(self, indices: Tensor, epoch: int) -> Tensor:
        """Records at the places ``indices`` of an epoch, (B,), int64, counted over all stores."""
        stores = torch.searchsorted(self._places, indices, right=True) - 1
        out = indices - self._places[stores] + self._starts[stores]
        for index in stores.unique().tolist():
            if (cumulated := self._cumulated[index]) is not None:
                own = stores == index
                u = torch.rand(1, generator=epoch_generator(self.seed, epoch, 1000 + index), dtype=torch.float64)
                wanted = (indices[own] - self._places[index] + u) * (cumulated[-1] / self.sizes[index])
                rows = torch.searchsorted(cumulated, wanted, right=True)
                out[own] = self._starts[index] + rows.clamp_max(len(cumulated) - 1)
        return out

    def gather(self, indices: Tensor, epoch: int) -> Batch:
        """Conditions as stored, and latents as float32.

        Raises:
            ValueError: the places belong to stores of different sizes.
        """
        records = self.records(indices, epoch)
        stores = (torch.searchsorted(self._starts, records, right=True) - 1).unique().tolist()
        if len(stores) != 1:
            raise ValueError("a batch of several sizes was asked for; use the data module's own loader.")
        names = [*self.keys, *([_LATENTS] if self.latents else [])]
        found = self.stores[stores[0]].gather(records - self._starts[stores[0]], names)
        x0 = found.pop(_LATENTS).float() if self.latents else None
        return Batch(cond=found, x0=x0, size=len(indices))


def _shares(sums: Sequence[float], total: int) -> list[int]:
    """Places in proportion to sums of weights, all > 0: largest remainders of ``total``, but at least 1 each."""
    exact = [total * part / sum(sums) for part in sums]
    places = [int(part) for part in exact]
    order = sorted(range(len(sums)), key=lambda i: places[i] - exact[i])
    for i in order[: total - sum(places)]:
        places[i] += 1
    return [max(1, n) for n in places]


class CachedConditions(DistillationDataModule):
    """Text embeddings alone, for data-free methods; they draw the noise themselves.

    Args:
        path: folder of a store, see ``lightning-distill cache``.
        cond_keys: conditions to give out; None is all of the store's.
        pipeline: folder of the pipeline whose text encoder must have made the store; None is the teacher's, where that
            is a pipeline's folder.
        verify: compare the shards with their checksums before training; each is read once per machine, and again when
            its file has changed.
        **kwargs: arguments of ``DistillationDataModule``.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store is not complete, lacks a condition, or was made with another text encoder; or stores in
            the folder were made with different ones.
    """

    num_classes = None
    latents = False

    def __init__(
        self,
        path: str,
        cond_keys: list[str] | None = None,
        pipeline: str | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.pipeline, self.verify = path, pipeline, verify
        self.stores = open_stores(path)
        have = [name for name in self.stores[0].names if name != _LATENTS]
        self.cond_keys = have if cond_keys is None else list(cond_keys)
        if missing := [key for key in self.cond_keys if key not in have]:
            raise ValueError(f"the store {path} has no {missing[0]!r}; it has the conditions {', '.join(have)}.")

    def prepare_data(self) -> None:
        """Refuse damaged shards; called in one process per machine.

        Raises:
            ValueError: a shard does not match its checksum.
        """
        if self.verify:
            verify_stores(self.stores, "verify=false")

    def make_source(self) -> StoreSource:
        """The records of all stores from which any can be drawn."""
        source = StoreSource(self.stores, self.cond_keys, self.latents, self.seed)
        self.stores = source.stores
        if self.latents:
            self.shape = self.stores[0].shapes[_LATENTS]
        return source

    @property
    def prompts(self) -> list[str]:
        """Text of every record."""
        source = self.source
        assert isinstance(source, StoreSource)
        return source.prompts

    def setup(self, stage: str | None = None) -> None:
        """Compare the store with the teacher's pipeline, and check the scaling of latents."""
        if stage in (None, "fit"):
            folder = self.pipeline or _teacher_folder(self.trainer)
            if folder is not None:
                self.check_pipeline(folder)
        super().setup(stage)

    def check_pipeline(self, folder: str | Path) -> None:
        """Refuse a store that was made with other networks than those of a pipeline.

        Args:
            folder: of a pipeline; what it does not hold is not compared.

        Raises:
            ValueError: its text encoder, or its autoencoder where latents are used, is another one.
        """
        folder, key = Path(folder).expanduser(), self.stores[0].key
        text = (folder / "text_encoder").is_dir() and "text_encoder" in key
        if text and (found := text_digest(folder)) != key["text_encoder"]:
            raise ValueError(_other("text encoder", self.path, folder, found, key["text_encoder"]))
        if self.latents and (folder / "vae").is_dir() and "autoencoder_sha256" in key:
            identity = autoencoder_identity(folder)
            weights, scale = identity["autoencoder_sha256"], identity["autoencoder_scale"]
            if weights != key["autoencoder_sha256"]:
                ours, theirs = next(iter(weights.values()), "none"), next(iter(key["autoencoder_sha256"].values()), "")
                raise ValueError(_other("autoencoder", self.path, folder, ours, theirs))
            if (recorded := key.get("autoencoder_scale", scale)) != scale:
                raise ValueError(
                    f"the latents of {self.path} were scaled by {recorded}, and {folder} says {scale}; "
                    f"write them again with lightning-distill cache --pipeline {folder}."
                )

    # ------------------------------------------------------------------------------------------------ several sizes
    def check(self, count: int = 512) -> Scaling | None:
        """As the parent's; each size for itself."""
        source, scaling, start = self.source, None, 0
        assert isinstance(source, StoreSource)
        if len(self.stores) == 1 or not self.latents:
            return super().check(count) if self.latents else None
        for store, size in zip(source.stores, source.sizes):
            rows = start + torch.arange(size)[:: max(1, size * len(source.stores) // count)]
            x0 = source.gather(rows, 0).x0
            assert x0 is not None
            scaling = check_scaling(x0, self.sigma_data, self.mean, where=str(store.folder))
            start += size
        return scaling

    def train_dataloader(self) -> ResumableLoader:
        """The loader of this rank; with several sizes every batch is of one of them."""
        loader = super().train_dataloader()
        assert isinstance(loader.source, StoreSource)
        if len(loader.source.stores) == 1:
            return loader
        return BucketLoader(
            loader.source,
            loader.batch_size,
            sizes=loader.source.sizes,
            slices=loader.slices,
            seed=loader.seed,
            rank=loader.rank,
            world_size=loader.world_size,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            same_epoch=loader.same_epoch,
        )

    def val_dataloader(self) -> Any:
        """As the parent's, of the first size."""
        source = self.source
        assert isinstance(source, StoreSource)
        if len(source.stores) == 1 or (self.trainer is not None and self.trainer.state.fn == "fit"):
            return super().val_dataloader()
        return DataLoader(_OneBatch(source, min(self.batch_size, source.sizes[0])), batch_size=None)


class CachedLatents(CachedConditions):
    """Latents of pictures or videos with their text embeddings.

    Args:
        path: folder of a store, or of one store per size.
        sigma_data: standard deviation of the latents about their per-channel mean, as the teacher is scaled.
        mean: their mean, None to leave it unchecked.
        cond_keys: conditions to give out; None is all of the store's.
        pipeline: folder of the pipeline whose text encoder and autoencoder must have made the store; None is the
            teacher's, where that is a pipeline's folder.
        verify: compare the shards with their checksums before training, see ``CachedConditions``.
        **kwargs: arguments of ``DistillationDataModule``.

    Attributes:
        shape: of the latents; where there are several sizes, of the first one with a record that can be drawn.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store holds no latents, is not complete, or was made with other networks; or stores in the
            folder were made with different ones.
    """

    latents = True

    def __init__(
        self,
        path: str,
        sigma_data: float = 1.0,
        mean: float | None = None,
        cond_keys: list[str] | None = None,
        pipeline: str | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, cond_keys, pipeline, verify, **kwargs)
        if _LATENTS not in self.stores[0].names:
            raise ValueError(
                f"the store {path} holds no latents; write one with lightning-distill cache --images FOLDER, or use "
                "CachedConditions for data-free training."
            )
        self.sigma_data = sigma_data
        self.mean = mean
        self.shape = self.stores[0].shapes[_LATENTS]


def _teacher_folder(trainer: Any) -> Path | None:
    """Folder of the pipeline that the module's teacher comes from, where that is known."""
    module = None if trainer is None else trainer.lightning_module
    spec = getattr(module, "teacher_source", None)
    if not isinstance(spec, PretrainedDenoiser):
        return None
    local = spec.local_path()
    return local if local is not None and (local / "model_index.json").is_file() else None


def _other(what: str, path: str, folder: Path, found: str, recorded: str) -> str:
    return (
        f"the store {path} was made with another {what} (sha256 {recorded[:12]}) than that of {folder} (sha256 "
        f"{found[:12]}); write it again with lightning-distill cache --pipeline {folder}."
    )
