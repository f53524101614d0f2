"""Buckets: sizes, assignment, what is cut off, and batches of one size each."""

import pytest
import torch

from lightning_distill.data.buckets import Bucket, BucketLoader, assign, fit_to_bucket, make_buckets, time_ids


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(1024, 64, 2.0), (512, 64, 4.0), (64, 16, 1.0), (96, 8, 3.0)]
)
def test_sizes(resolution, step, ratio):
    buckets = make_buckets(resolution, step, ratio)
    assert Bucket(resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for b in buckets:
        assert b.height % step == b.width % step == 0
        assert max(b.height, b.width) / min(b.height, b.width) <= ratio
        assert b.height * b.width <= resolution**2
        # no room for another step on the longer side
        assert min(b.height, b.width) * (max(b.height, b.width) + step) > resolution**2
        assert Bucket(b.width, b.height) in buckets


def test_the_sizes_of_sdxl():
    # arXiv:2307.01952, appendix I: the sizes of ratio 1/2 to 2 whose sides the paper lists by the same rule
    published = {(1024, 1024), (960, 1088), (1088, 960), (896, 1152), (1152, 896), (832, 1216), (1216, 832)}
    assert published <= {(b.height, b.width) for b in make_buckets(1024)}


@pytest.mark.parametrize("wrong", [(100, 64, 2.0), (32, 64, 2.0), (64, 0, 2.0), (64, 64, 0.5)])
def test_bad_sizes(wrong):
    with pytest.raises(ValueError, match="must be a multiple of the step and the ratio at least 1"):
        make_buckets(*wrong)


def test_assignment_is_by_the_nearest_ratio():
    buckets = make_buckets(1024)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        height, width = torch.randint(10, 4000, (2,), generator=generator).tolist()
        chosen = buckets[assign(height, width, buckets)]
        distance = {b: abs(torch.tensor(b.width / b.height * height / width).log().item()) for b in buckets}
        assert distance[chosen] == pytest.approx(min(distance.values()), abs=1e-6)
    assert buckets[assign(7, 7, buckets)] == Bucket(1024, 1024)
    alike = [Bucket(8, 16), Bucket(32, 64), Bucket(16, 32)]
    assert assign(10, 20, alike) == 1


def test_what_is_cut_off():
    bucket = Bucket(32, 16)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 16:48] = 200
    fitted, crop = fit_to_bucket(image, bucket)
    assert fitted.shape == (3, 32, 16)
    assert crop == (0, 8)  # resized to 32 x 32, of which 8 columns go at either side
    assert fitted[:, :, 2:-2].float().mean() == pytest.approx(200, abs=2)
    same, crop = fit_to_bucket(image[:, :32, :16], bucket)
    assert torch.equal(same, image[:, :32, :16])
    assert crop == (0, 0)
    video = torch.randint(0, 255, (3, 4, 64, 64)).to(torch.uint8)
    fitted, _ = fit_to_bucket(video, bucket)
    for frame in range(4):
        assert torch.equal(fitted[:, frame], fit_to_bucket(video[:, frame], bucket)[0])
    assert fit_to_bucket(torch.zeros(3, 33, 17), Bucket(64, 40))[0].shape == (3, 64, 40)


def test_time_ids_have_the_order_of_the_stock_pipeline():
    import diffusers

    stock = diffusers.StableDiffusionXLPipeline._get_add_time_ids

    class Pipe:
        class unet:
            class config:
                addition_time_embed_dim = 1

            class add_embedding:
                class linear_1:
                    in_features = 6

    expected = stock(Pipe(), (480, 640), (3, 5), (512, 768), torch.float32, text_encoder_projection_dim=0)
    assert torch.equal(time_ids((480, 640), (3, 5), Bucket(512, 768))[None], expected)


SIZES = [37, 5, 22]
pytestmark = pytest.mark.filterwarnings("ignore:1 of the 3 sizes have fewer samples")


class Source:
    def __len__(self):
        return sum(SIZES)

    def gather(self, indices, epoch):
        raise NotImplementedError


def loader(**settings):
    return BucketLoader(Source(), 3, sizes=SIZES, seed=1, **settings)


def bucket_of(indices):
    return torch.searchsorted(torch.tensor(SIZES).cumsum(0), indices.contiguous(), right=True)


@pytest.mark.parametrize(("slices", "world"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_batch_is_of_one_bucket(slices, world):
    ranks = [loader(slices=slices, rank=r, world_size=world) for r in range(world)]
    size = 3 * slices * world
    assert len(ranks[0]) == sum(n // size for n in SIZES)
    for epoch in range(3):
        together = torch.cat([r.indices(epoch) for r in ranks], dim=1)
        assert all(len(bucket_of(batch).unique()) == 1 for batch in together)
        seen = together.flatten()
        assert len(seen.unique()) == len(seen)
        assert seen.max() < sum(SIZES)
    assert not torch.equal(ranks[0].indices(0), ranks[0].indices(1))
    assert torch.equal(ranks[0].indices(1), loader(slices=slices, world_size=world).indices(1))


def test_buckets_alternate_within_an_epoch():
    kinds = bucket_of(loader().indices(0)[:, 0])
    assert set(kinds.tolist()) == {0, 1, 2}
    assert (kinds.diff() != 0).sum() > 3  # not one bucket after the other


def test_two_ranks_see_what_one_sees():
    one = BucketLoader(Source(), 6, sizes=SIZES, seed=1)
    two = [loader(rank=r, world_size=2) for r in range(2)]
    assert torch.equal(torch.cat([r.indices(2) for r in two], dim=1), one.indices(2))


def test_sizes_of_too_few_samples_are_told():
    with pytest.warns(UserWarning, match=rf"1 of the 3 sizes have fewer samples \({min(SIZES)}\) than a cycle takes"):
        BucketLoader(Source(), min(SIZES) + 1, sizes=SIZES)


@pytest.mark.filterwarnings("ignore:2 of the 3 sizes")
def test_few_samples_fill_one_batch():
    few = BucketLoader(Source(), 50, sizes=SIZES, seed=1)
    assert len(few) == 1
    assert bucket_of(few.indices(0)).unique().tolist() == [0]
    assert set(few.indices(0).flatten().tolist()) == set(range(37))
    with pytest.raises(ValueError, match="the buckets hold 64 samples, but the source has 65"):
        BucketLoader(type("Longer", (Source,), {"__len__": lambda self: 65})(), 3, sizes=SIZES)


def test_other_buckets_are_not_resumed():
    """With as many samples in all, the order would differ without a word."""
    first = loader()
    first.epoch, first.batch = 1, 4
    state = first.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert (again.epoch, again.batch) == (1, 4)
    a, b, *rest = SIZES
    other = BucketLoader(Source(), 3, sizes=[a - 3, b + 3, *rest], seed=1)
    with pytest.raises(ValueError, match=rf"with 3 buckets of {a}, {b}, .* now has 3 buckets of {a - 3}, {b + 3}, "):
        other.load_state_dict(state)
    assert (other.epoch, other.batch) == (0, 0)
    del state["sizes"]  # of an earlier version
    other.load_state_dict(state)
    assert (other.epoch, other.batch) == (1, 4)
