"""Metrics: distances against clean-fid and torchmetrics, stored features, speed, scores, paired intervals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy
import scipy.stats
import torch

from evaluation import statistics
from evaluation.metrics import features, fid, speed
from evaluation.metrics.alignment import AttributeFeatures
from evaluation.run_folder import Record, RunFolder, Snapshot
from evaluation.score import Metric, MetricInfo, Scores, keep_scores, read_scores, score
from sjd2.errors import UserError
from sjd2.files import ROOT
from tests.helpers.extractors import MeanColour, StandIn
from tests.helpers.runs import MODEL, a_run, forget_likelihood, gaussian, pixels


def run_features(run: RunFolder, extractor: features.Extractor) -> np.ndarray:
    """Return the features of all images of a run as scoring makes and keeps them."""
    metric = FeaturesOnly(extractor)
    metric.score(run)
    return metric.rows


class FeaturesOnly(fid.FeatureDistance):
    """The features alone, without a reference."""

    def __init__(self, extractor: features.Extractor) -> None:
        super().__init__(extractor=extractor)

    def start(self, run: Snapshot) -> list[Record]:
        self._features = features.RunFeatures(run, self.extractor)
        return self._features.missing

    def compute(self, run: Snapshot) -> Scores:
        self.rows = self._features.finish()
        return Scores()


# ---- distances against the libraries


@pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18),
    reason="clean-fid calls sqrtm(disp=), gone in SciPy 1.18",
)
@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 16), (64, 48, 64), (40, 300, 64)])
def test_frechet_agrees_with_clean_fid(n: int, m: int, d: int) -> None:
    from cleanfid.fid import fid_from_feats

    a, b = gaussian(n, d, 1).astype(np.float64), gaussian(m, d, 2, shift=0.3).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fid_from_feats(a, b)
    ours = fid.frechet(fid.Statistics.of(a), fid.Statistics.of(b))
    # below full rank their square root is the less exact one
    assert ours == pytest.approx(theirs, rel=1e-9 if min(n, m) > d else 1e-5)


def test_frechet_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 48

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double()

    a, b = (torch.from_numpy(np.stack(pixels(n, 4))).permute(0, 3, 1, 2) for n in (80, 90))
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 4))
    metric.update(a, real=True)
    metric.update(b, real=False)
    sets = (x.flatten(1).numpy().astype(np.float64) for x in (a, b))
    ours = fid.frechet(*map(fid.Statistics.of, sets))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)  # it returns float32


def test_frechet_of_known_gaussians() -> None:
    mean, deviation = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    a = fid.Statistics.of_moments(np.zeros(2), np.eye(2))
    b = fid.Statistics.of_moments(mean, np.diag(deviation**2))
    assert fid.frechet(a, b) == pytest.approx((mean**2).sum() + ((deviation - 1) ** 2).sum())
    assert fid.frechet(b, b) == pytest.approx(0, abs=1e-9)
    x = gaussian(50, 6).astype(np.float64)
    whole = fid.Statistics.of_moments(x.mean(0), np.cov(x, rowvar=False))
    assert fid.frechet(whole, b.of(x)) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_agrees_with_clean_fid_and_with_the_exact_value() -> None:
    from cleanfid.fid import kernel_distance
    from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

    a, b = gaussian(400, 24, 1, shift=0.2), gaussian(500, 24, 2)
    exact = fid.mmd(a, b)
    double = [torch.from_numpy(x).double() for x in (b, a)]
    # torchmetrics' function asks for sets of one size
    assert fid.mmd(a, b[:400]) == pytest.approx(poly_mmd(double[0][:400], double[1]).item(), rel=1e-9)
    before, mine = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    subsets = fid.Subsets(count=300, size=1000, seed=3)
    mean, deviation = fid.kernel_distance(a, b, subsets)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(mine, np.random.get_state()[1])  # noqa: NPY002
    assert fid.kernel_distance(a, b, subsets) == (mean, deviation)
    theirs = KernelInceptionDistance(torch.nn.Identity(), subsets=300, subset_size=200)
    theirs.update(double[0], real=True)
    theirs.update(double[1], real=False)
    torch.manual_seed(3)
    assert (mean, deviation) == tuple(map(float, theirs.compute()))
    assert mean == pytest.approx(exact, abs=4 * deviation / np.sqrt(100))
    assert kernel_distance(a, b, num_subsets=300, max_subset_size=200) == pytest.approx(exact, abs=deviation)
    assert 0 < deviation < exact


def test_kernel_distance_has_no_bias() -> None:
    values = [fid.mmd(gaussian(40, 8, seed), gaussian(40, 8, 1000 + seed)) for seed in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


# ---- features, references


def test_features_are_kept_and_only_new_images_computed(tmp_path: Path) -> None:
    extractor, images = MeanColour(), pixels(6)
    run = a_run(tmp_path / "run", images[:4])
    first = run_features(run, extractor)
    assert extractor.seen == 4
    a_run(tmp_path / "run", images, launches=())  # the first four lines are there already
    both = run_features(run, extractor)
    assert extractor.seen == 6
    assert np.array_equal(both[:4], first)
    assert np.array_equal(both, MeanColour()(images))
    path = features.features_file(run, extractor)
    assert sorted(features.load_features(path)) == [(i, 0) for i in range(6)]
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(run_features(run, extractor), both)
    assert extractor.seen == 12


def test_features_of_other_tokens_are_not_reused(tmp_path: Path) -> None:
    extractor = MeanColour()
    run_features(a_run(tmp_path / "run", pixels(3)), extractor)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"tokens_sha256": "0" * 64}
    (tmp_path / "run" / "samples.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    run_features(RunFolder(tmp_path / "run"), extractor)
    assert extractor.seen == 4


def test_feature_distance_warns_of_few_images_and_leaves_out_what_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = MeanColour()(pixels(200))
    np.savez(tmp_path / "reference.npz", features=x, digest="meancolour", name="noise")
    metric = fid.FeatureDistance(extractor=MeanColour(), reference=str(tmp_path / "reference.npz"))
    metric.check()
    few, enough = (metric.score(a_run(tmp_path / str(n), pixels(n))) for n in (20, 120))
    assert "N=20 is few for 12 features" in few["fid_warning"]
    assert caplog.text == ""  # the table says it
    assert "fid_warning" not in enough
    assert enough["fid_extractor"] == "mean colour meancolour"
    assert enough["fid_reference"] == "noise"
    assert few["fid"] > enough["fid"] > 0  # the bias that the warning speaks of
    assert enough.keys() <= {info.name for info in metric.numbers} | set(metric.details)
    metric.extractor.size = (299, 299)
    assert metric.score(RunFolder(tmp_path / "20")).keys() == {"fid_warning"}
    assert metric.score(a_run(tmp_path / "one", pixels(1))).keys() == {"fid_warning"}


def test_prompts_of_one_s_own_get_no_distance_to_rendered_shapes(tmp_path: Path) -> None:
    held_out = (ROOT / "sjd2" / "models" / "tiny" / "captions.txt").read_text().splitlines()[:2]
    images = [np.zeros((48, 48, 3), np.uint8)] * 2
    metric = fid.FeatureDistance(extractor=AttributeFeatures())
    assert metric.score(a_run(tmp_path / "a", images, prompts=held_out))["fid"] > 0
    seen = "a small red circle left of a small blue circle on a plain teal background"  # of the grammar, not held out
    for prompt in ("a dog", seen):
        found = metric.score(a_run(tmp_path / prompt[:5], images, prompts=[held_out[0], prompt]))
        assert found.keys() == {"fid_warning"}
        assert f"prompts=shapes, and {prompt[:20]!r}"[:-1] in found["fid_warning"]


def test_inception_agrees_with_clean_fid_on_a_folder(tmp_path: Path) -> None:
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    torch.jit.script(StandIn()).save(str(tmp_path / features.INCEPTION_FILE))
    run = a_run(tmp_path / "run", pixels(5, 48))
    extractor = features.Inception(weights=str(tmp_path), device="cpu", batch_size=2)
    extractor.check()
    network = InceptionV3W(str(tmp_path), download=False).eval()
    settings = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False, "mode": "clean"}
    theirs = get_folder_features(str(run.path / "images"), network, **settings)
    assert np.allclose(run_features(run, extractor), theirs, atol=1e-5)
    same = features.Inception(weights=str(tmp_path / features.INCEPTION_FILE))
    assert same.digest() == extractor.digest()


def test_inception_is_never_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never downloads"):
        features.Inception().check()
    with pytest.raises(UserError, match=f"has no {features.INCEPTION_FILE}"):
        features.Inception(weights=str(tmp_path)).check()
    (tmp_path / features.INCEPTION_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read"):
        features.Inception(weights=str(tmp_path)).load()
    with pytest.raises(UserError, match="reference=FOLDER"):
        fid.FeatureDistance(extractor=MeanColour(), reference=None).check()


# ---- speed


def test_ar_compresses_by_one_exactly_with_and_without_forced_tokens(tmp_path: Path) -> None:
    forced = MODEL | {"rows": 2, "columns": 2, "vocabulary": 8, "row_end": 90, "prefix": [91]}
    run = a_run(tmp_path, pixels(3), model=forced, tokens=7, forwards=7, accepted=[[1] * 7] * 3, nll=14.0)
    out = speed.Speed().score(run)
    assert out["step_compression"] == 1
    assert out["step_compression_free"] == 1
    assert out["nll_per_token"] == 2
    assert out["accepted_per_forward_hist"] == {"1": 21}


def test_free_compression_drops_forced_tokens_and_their_passes() -> None:
    free = np.array([0, 1, 1, 0, 1, 1, 0], bool)  # header, two rows of two with an end each
    record = {"tokens": 7, "forwards": 4, "accepted": [1, 3, 2, 1]}  # the first and the last pass: a forced token alone
    assert speed.step_compression(record) == 7 / 4
    assert speed.step_compression_free(record, free) == 4 / 2


def test_compression_is_the_mean_over_images(tmp_path: Path) -> None:
    accepted, forwards = [[1, 1, 1, 1], [1, 3]], [4, 2]
    out = speed.Speed().score(a_run(tmp_path, pixels(2), accepted=accepted, forwards=forwards))
    assert out["step_compression"] == 1.5
    assert out["forwards_mean"] == 3
    assert out["accepted_per_forward_hist"] == {"1": 5, "3": 1}


def test_seconds_of_fixed_batches(tmp_path: Path) -> None:
    slow = {"encode": 0.1, "prefill": 0.2, "decode": 2.7, "image": 1.0}
    fast = {"encode": 0.1, "prefill": 0.2, "decode": 0.7, "image": 1.0}
    run = a_run(tmp_path, pixels(4), seconds=[fast, fast, slow, slow], batch=[0, 0, 1, 1])
    run.close_launch(0, {"peak_memory_gb": 1.5})
    out = speed.Speed().score(run)
    assert out["latency_s_median"] == pytest.approx((0.9 + 2.9) / 2)
    assert out["latency_s_p95"] == pytest.approx(np.quantile([0.9, 0.9, 2.9, 2.9], 0.95))
    assert out["images_per_s"] == pytest.approx(4 / (2.0 + 4.0))  # two batches of two
    assert out["seconds_decode_mean"] == pytest.approx(1.7)
    assert out["peak_memory_gb"] == 1.5
    assert set(out) <= {info.name for info in speed.Speed.numbers} | set(speed.Speed.details)


def test_seconds_under_refill_follow_littles_law() -> None:
    record = {"batch_rows": 4, "seconds": {"encode": 0.0, "prefill": 0.0, "decode": 2.0, "image": 0.25}}
    assert speed.seconds_per_image(record, refill=True) == 2.0 / 4 + 0.25
    assert speed.seconds_per_image(record, refill=False) == 2.25 / 4


def test_times_come_from_one_machine_and_from_untraced_images(tmp_path: Path) -> None:
    machines = [{"hardware": "a", "threads": 1}, {"hardware": "b", "threads": 1}]
    slow = {"encode": 0.0, "prefill": 0.0, "decode": 99.0, "image": 0.0}
    fast = slow | {"decode": 1.0}
    seconds = [slow, fast, fast, slow]
    run = a_run(tmp_path, pixels(4), launches=machines, launch=[0, 1, 1, 1], seconds=seconds)
    run.write_trace((3, 0), [(1.0, 1)])
    out = speed.Speed().score(run)
    assert out["latency_s_p95"] == 1.0
    assert out["hardware"] == "b"
    assert out["n_timed"] == 2
    for i in range(4):
        run.write_trace((i, 0), [(1.0, 1)])
    assert "latency_s_median" not in speed.Speed().score(run)
    assert "step_compression" in speed.Speed().score(run)


def test_unknown_likelihood_and_layout_are_absent(tmp_path: Path) -> None:
    run = a_run(tmp_path, pixels(3), model={"_target_": "sjd2.models.chameleon.Nothing"})
    forget_likelihood(run, 1)
    out = speed.Speed().score(run)
    assert "nll_per_token" not in out  # not the mean of the other two
    assert out["nll_missing"] == 1
    assert "step_compression_free" not in out
    assert speed.Speed().score(a_run(tmp_path / "empty")) == {}


# ---- score


class Constant(Metric):
    numbers = (MetricInfo(name="a"), MetricInfo(name="b"))
    protocol = "a constant."

    def __init__(self, **values: float) -> None:
        self.values = values

    def compute(self, run: Snapshot) -> Scores:
        return Scores(self.values)


def test_scores_of_other_metrics_stay_while_n_does(tmp_path: Path) -> None:
    run = a_run(tmp_path, pixels(2))
    assert score(run, {"one": Constant(a=1, b=2)})["protocol"] == {"one": "a constant."}
    other = Constant(c=3)
    other.numbers = (MetricInfo(name="c"),)
    assert score(run, {"other": other}) == run.metrics
    assert run.metrics == {
        "n_images": 2,
        "a": 1,
        "b": 2,
        "c": 3,
        "protocol": {"one": "a constant.", "other": "a constant."},
    }
    assert score(run, {"one": Constant(a=4)}).keys() == {"n_images", "a", "c", "protocol"}  # b is absent, not stale
    a_run(tmp_path, pixels(3), launches=())
    assert score(run, {"one": Constant(a=5)}) == {"n_images": 3, "a": 5, "protocol": {"one": "a constant."}}
    with pytest.raises(TypeError, match="does"):
        score(run, {"one": Constant(does=1)})


def test_scores_of_images_are_merged_by_column(tmp_path: Path) -> None:
    run = a_run(tmp_path, pixels(2))
    keep_scores(run, {"clip": {(0, 0): 1.0, (1, 0): 2.0}, "alignment": {(0, 0): 0.5}})
    keep_scores(run, {"clip": {(1, 0): 3.0}})
    assert read_scores(run) == {(0, 0): {"alignment": 0.5}, (1, 0): {"clip": 3.0}}
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[1]) == {"id": [1, 0], "clip": 3.0}


# ---- intervals


def paired_values(prompts: int, gap: float, noise: float, seed: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    level = rng.normal(0, 10, prompts)  # what the prompt has in common in both runs
    a = {(i, 0): level[i] + rng.normal(0, noise) for i in range(prompts)}
    return a, {(i, 0): level[i] + gap + rng.normal(0, noise) for i in range(prompts)}


def test_paired_difference_agrees_with_scipy() -> None:
    a, b = paired_values(80, 0.5, 1.0, 0)
    found = statistics.paired(a, b, replicates=4000)
    gaps = np.array([b[key] - a[key] for key in a])
    theirs = scipy.stats.bootstrap((gaps,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.03)
    assert found.p == pytest.approx(scipy.stats.ttest_rel(list(b.values()), list(a.values())).pvalue)
    assert (found.prompts, found.images) == (80, 80)
    assert statistics.paired(a, b) == statistics.paired(a, b)  # seeded


def test_paired_intervals_cover_as_often_as_they_say() -> None:
    inside = [
        (d := statistics.paired(*paired_values(40, 0.3, 1.0, s), replicates=300)).low < 0.3 < d.high for s in range(300)
    ]
    assert 0.90 < np.mean(inside) < 0.98


def test_more_comparisons_widen_the_interval() -> None:
    a, b = paired_values(60, 0.3, 1.0, 3)
    one, ten = (statistics.paired(a, b, comparisons=m) for m in (1, 10))
    assert ten.low < one.low < one.high < ten.high
    assert ten.p == pytest.approx(min(1, 10 * one.p))


def test_repeats_of_a_prompt_are_one_draw() -> None:
    a, b = paired_values(30, 0.2, 1.0, 5)
    single = statistics.paired(a, b)
    copies = [{(i, r): v for (i, _), v in run.items() for r in range(4)} for run in (a, b)]
    fourfold = statistics.paired(*copies)  # four equal images say no more than one
    assert (fourfold.low, fourfold.high) == pytest.approx((single.low, single.high))
    assert fourfold.p == pytest.approx(single.p)
    assert (fourfold.prompts, fourfold.images) == (30, 120)


def test_equal_runs_differ_by_nothing_and_lonely_prompts_are_refused() -> None:
    a, _ = paired_values(5, 0, 1, 0)
    same = statistics.paired(a, a)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    prompts = len({key[0] for key in a})
    assert statistics.paired(a, {key: value + 1 for key, value in a.items()}).p == 2.0 ** (
        1 - prompts
    )  # all of one sign
    with pytest.raises(UserError, match="fewer than 2 prompts"):
        statistics.paired({(0, 0): 1.0, (0, 1): 2.0}, {(0, 0): 1.0, (0, 1): 2.0})
    with pytest.raises(UserError, match="level=95"):
        statistics.paired(a, a, level=95)


def feature_runs(n: int, shift: float, seed: int) -> tuple[dict, dict]:
    a, b = gaussian(n, 6, seed), gaussian(n, 6, seed + 1, shift)
    return {(i, 0): row for i, row in enumerate(a)}, {(i, 0): row for i, row in enumerate(b)}


def test_paired_distances_see_a_difference_and_no_other() -> None:
    reference = gaussian(400, 6, 77)
    moments = fid.Statistics.of(reference)
    a, b = feature_runs(200, 0.4, 1)
    worse = statistics.paired_fid(a, b, moments), statistics.paired_kid(a, b, reference)
    for found in worse:
        assert 0 < found.low < found.mean < found.high
        assert found.p < 0.01
    x = [np.stack(list(run.values())) for run in (a, b)]
    assert worse[0].mean == pytest.approx(np.subtract(*[fid.frechet(fid.Statistics.of(y), moments) for y in x[::-1]]))
    assert worse[1].mean == pytest.approx(np.subtract(*[fid.kernel_distance(y, reference)[0] for y in x[::-1]]))
    assert worse[1].mean == pytest.approx(fid.mmd(x[1], reference) - fid.mmd(x[0], reference), abs=0.02)
    for found in (statistics.paired_fid(a, a, moments, replicates=5), statistics.paired_kid(a, a, reference)):
        assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_distances_of_scored_runs_need_no_network(tmp_path: Path) -> None:
    images = pixels(30)
    darker = [image // 2 for image in images]
    np.savez(tmp_path / "reference.npz", features=MeanColour()(pixels(60)), digest="meancolour")
    metric = fid.FeatureDistance(extractor=MeanColour(), reference=str(tmp_path / "reference.npz"))
    a, b = a_run(tmp_path / "a", images), a_run(tmp_path / "b", darker)
    with pytest.raises(UserError, match="a holds no features"):
        statistics.paired_distance(a, b, metric, "fid")
    values = [metric.score(run)["fid"] for run in (a, b)]
    found = statistics.paired_distance(a, b, metric, "fid")
    assert found.mean == pytest.approx(values[1] - values[0], rel=1e-6)
    assert found.low > 0
    assert statistics.paired_distance(a, b, metric, "kid").low > 0
    with pytest.raises(UserError, match="unknown distance"):
        statistics.paired_distance(a, b, metric, "is")


def test_paired_distances_of_equal_distributions_cover_zero() -> None:
    reference = gaussian(300, 6, 77)
    moments = fid.Statistics.of(reference)
    hits = {"fid": 0, "kid": 0}
    for seed in range(0, 80, 2):
        a, b = feature_runs(100, 0.0, 1000 + seed)
        found = (
            statistics.paired_fid(a, b, moments, replicates=40),
            statistics.paired_kid(a, b, reference, replicates=200),
        )
        for name, value in zip(hits, found, strict=True):
            hits[name] += value.low < 0 < value.high
    assert all(33 <= count <= 40 for count in hits.values()), hits


def test_values_of_images_come_from_records_and_scores(tmp_path: Path) -> None:
    run = a_run(tmp_path, pixels(2), forwards=[4, 2], nll=[8.0, 6.0])
    keep_scores(run, {"clip": {(0, 0): 20.0}})
    assert statistics.image_values(run, "forwards") == {(0, 0): 4, (1, 0): 2}
    assert statistics.image_values(run, "step_compression") == {(0, 0): 1, (1, 0): 2}
    assert statistics.image_values(run, "clip") == {(0, 0): 20.0}
    assert statistics.image_values(run, "alignment") == {}
    with pytest.raises(UserError, match="Valid: forwards"):
        statistics.image_values(run, "beauty")
