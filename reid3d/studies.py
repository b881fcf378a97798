"""The tables of the papers, as lists of runs: what `reid3d study NAME` trains and tests, at the size of a budget.

"cpu": small networks and few epochs, hours on two cores, made for a synthetic world. "gpu": the published networks and
clouds, but 100 epochs of networks of clouds for 1,000 or more. "paper": the published recipes; those of the data set
where there are such, else Market-1501's. A 2D method begins from scratch where no weights of ImageNet are given.

Source of what is compared: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", TNNLS 2022,
tables I to V and fig. 7; the papers of the 2D methods, named in their files: their ablations, and table 2 of QAConv's.
The published figures are of Market-1501 and the paper's other data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from .study import Bodies, Row, Study, Trial

Budget = Literal["cpu", "gpu", "paper"]


class Size(NamedTuple):
    """How large everything is. recipe: of networks of clouds, by the name of an OG-Net. words: what differs from it.
    points: of a cloud. net: of OG-Nets, pointnet2: of PointNet++, dgcnn: of DGCNN. images: words for plain networks of
    images. of_2d: how the recipe of a 2D method is called.
    """

    recipe: str
    words: tuple[str, ...]
    points: int
    net: dict[str, Any]
    pointnet2: dict[str, Any]
    dgcnn: dict[str, Any]
    images: tuple[str, ...]
    of_2d: str
    ks: tuple[int, ...]


CPU = Size(
    recipe="synth",
    words=("--cloud.background", "true", "--cloud.points", "1024"),
    points=1024,
    net={"k": 8, "init_points": 128, "dropout": 0.3},
    pointnet2={"points": [128, 32], "dropout": 0.3},
    dgcnn={"k": 8, "dropout": 0.3},
    images=("--image.height", "128", "--image.width", "64"),
    of_2d="synth_{}",
    ks=(2, 4, 8, 16),
)
PAPER = Size(
    recipe="{}_{{}}",
    words=(),
    points=4096,
    net={},
    pointnet2={},
    dgcnn={},
    images=(),
    of_2d="{}_{{}}",
    ks=(4, 8, 16, 32, 64),
)
GPU = PAPER._replace(words=("--train.epochs", "100", "--train.warmup", "2"))
BUDGETS: dict[Budget, Size] = {"cpu": CPU, "gpu": GPU, "paper": PAPER}


def ognet(
    size: Size,
    name: str,
    model: str = "ognet_small",
    words: tuple[str, ...] = (),
    *,
    circle: bool = False,
    **changes: Any,
) -> Row:
    """A row of an OG-Net. circle: by the recipe with circle loss, where there is one. changes: fields of the row."""
    kwargs = {**size.net, **changes.pop("kwargs", {})}
    recipe = size.recipe.format(f"{model}_circle" if circle else model)
    return Row(name, recipe, model, kwargs, (*size.words, *words), **changes)


def of_clouds(
    size: Size, name: str, model: str, kwargs: dict[str, Any], words: tuple[str, ...] = (), **changes: Any
) -> Row:
    """A row of another network of clouds, by the recipe of OG-Net-Small."""
    return Row(name, size.recipe.format("ognet_small"), model, kwargs, (*size.words, *words), **changes)


def of_2d(size: Size, name: str, model: str, market: tuple[float, float] | None = None, **changes: Any) -> Row:
    """A row of one of the four 2D methods, by its own recipe. market: published Rank-1 and mAP on Market-1501."""
    changes = {"paper": {"market": market} if market else {}, **changes}
    return Row(name, size.of_2d.format(model), backbone="osnet" if model == "plr_osnet" else "resnet50", **changes)


def methods(size: Size) -> list[Row]:
    """The four 2D methods, whose images stay as they are."""
    return [
        of_2d(size, "PLR-OSNet", "plr_osnet", (95.6, 88.9)),
        of_2d(size, "relation network, S", "relation_s", (94.8, 88.0)),
        of_2d(size, "RMGL", "rmgl", (96.2, 90.0)),
        of_2d(size, "QAConv", "qaconv50"),
    ]


def inputs(size: Size) -> Study:
    rows = (
        ognet(
            size,
            "3D, visible part",
            words=("--cloud.background", "false"),
            paper={"market": (77.64, 54.52), "duke": (None, 37.25), "cuhk": (42.79, 38.29)},
        ),
        ognet(
            size,
            "2D image as (x, y, 0)",
            kwargs={"flat": True},
            paper={"market": (85.72, 67.28), "duke": (75.49, 55.98), "cuhk": (40.14, 36.33)},
        ),
        ognet(
            size,
            "3D, visible part and background",
            paper={"market": (86.79, 67.92), "duke": (77.33, 57.74), "cuhk": (43.07, 38.06)},
        ),
    )
    return Study("inputs", "What the points are", rows)


def background(size: Size) -> Study:
    """Why the background pays or does not: it holds what is worn beyond the body, and takes points from the body, which
    is about a quarter of a crop. A synthetic world tells which of its pixels are the person's. PointNet++ tells whether
    it is so for other networks too.
    """
    centres = size.net.get("init_points", 768)  # of the first sampling

    def of(name: str, share: float = 1.0, *words: str, bodies: Bodies = "fitted") -> Row:
        points, sampled = round(share * size.points), round(share * centres)
        kwargs: dict[str, Any] = {}
        if share != 1:
            words, kwargs = (*words, "--cloud.points", str(points)), {"init_points": sampled}
        return ognet(size, f"{name}: {points} points, {sampled} centres", words=words, kwargs=kwargs, bodies=bodies)

    alone = ("--cloud.background", "false")
    rows = (
        *(of("visible part", share, *alone) for share in (0.25, 0.5, 1)),
        of("and the rest of the person", bodies="person"),
        *(of("and background", share) for share in (1, 2)),
        *(
            of_clouds(size, f"{name}, {seen}", model, size.pointnet2, words)
            for name, model in {"PointNet++ SSG": "pointnet2_ssg", "PointNet++ MSG": "pointnet2_msg"}.items()
            for seen, words in {"visible part": alone, "and background": ()}.items()
        ),
    )
    return Study("background", "What the background adds and takes", rows)


def models(size: Size) -> Study:
    def plain(name: str, model: str, **changes: Any) -> Row:
        return Row(name, size.recipe.format("ognet_small"), model, {}, (*size.words, *size.images), **changes)

    market, duke, msmt, cuhk = "market", "duke", "msmt", "cuhk"
    rows = (
        of_clouds(
            size, "DGCNN", "dgcnn", size.dgcnn, paper={market: (None, 13.33), duke: (None, 15.16), msmt: (2.84, 1.19)}
        ),
        of_clouds(
            size,
            "PointNet++ SSG",
            "pointnet2_ssg",
            size.pointnet2,
            paper={market: (61.79, 37.89), duke: (55.70, 35.16), msmt: (22.94, 9.61), cuhk: (14.57, 13.97)},
        ),
        of_clouds(
            size,
            "PointNet++ MSG",
            "pointnet2_msg",
            size.pointnet2,
            paper={market: (72.51, 47.21), duke: (60.23, 39.36), msmt: (28.99, 12.52), cuhk: (21.14, 19.79)},
        ),
        ognet(
            size,
            "OG-Net-Small",
            paper={market: (86.79, 67.92), duke: (77.33, 57.74), msmt: (42.44, 20.31), cuhk: (43.07, 38.06)},
        ),
        ognet(
            size,
            "OG-Net",
            "ognet",
            paper={market: (86.82, 69.02), duke: (76.53, 57.92), msmt: (44.27, 21.57), cuhk: (44.00, 39.28)},
        ),
        ognet(
            size,
            "OG-Net-Deep",
            "ognet_deep",
            paper={market: (88.36, 71.27), duke: (76.97, 59.23), msmt: (44.56, 21.41), cuhk: (45.71, 41.15)},
        ),
        plain("OSNet", "osnet"),
        plain(
            "ResNet-50",
            "resnet50",
            paper={market: (84.59, 65.31), duke: (73.20, 55.96), msmt: (46.88, 22.25), cuhk: (35.43, 32.09)},
        ),
        *methods(size),
    )
    return Study("models", "Networks of clouds and of images", rows, sized=True)


def transfer(size: Size) -> Study:
    rows = []
    for start, (trained, other) in {"A": (0, 1), "B": (1, 0)}.items():
        for on, name in ((trained, start), (other, "B" if start == "A" else "A")):
            test = Trial(on=on)
            rows.append(ognet(size, f"OG-Net-Small, {start} to {name}", trained_on=trained, test=test))
            figures = {"market to duke": (48.8, 28.7), "duke to market": (58.6, 27.2)} if on != trained else {}
            named = f"QAConv, {start} to {name}"
            rows.append(of_2d(size, named, "qaconv50", trained_on=trained, test=test, paper=figures))
    return Study("transfer", "Trained on one data set, tested on another", tuple(rows))


def components(size: Size) -> Study:
    def of(map_: float) -> dict[str, tuple[float | None, float]]:
        return {"market": (None, map_)}

    rows = (
        ognet(size, "no graph, no SE", circle=True, kwargs={"k": 1, "se": False}, paper=of(64.65)),
        ognet(size, "SE", circle=True, kwargs={"k": 1}, paper=of(65.50)),
        ognet(size, "SE, graph", circle=True, kwargs={"nonlocal_graph": False}, paper=of(69.33)),
        ognet(size, "SE, graph, non-local graph", circle=True, paper=of(70.48)),
    )
    return Study("components", "Parts of OG-Net-Small", rows)


def graphs(size: Size) -> Study:
    """Whether the graphs pay may depend on what else there is: each with and without SE, on all of the crop and on the
    body alone, so that what a part is worth is a mean of four pairs.
    """
    clouds: dict[str, tuple[str, ...]] = {"all": (), "visible part": ("--cloud.background", "false")}
    gates: dict[str, dict[str, Any]] = {"": {"se": False}, "SE, ": {}}
    kinds: dict[str, dict[str, Any]] = {
        "no graph": {"k": 1},
        "graph": {"nonlocal_graph": False},
        "graph, non-local graph": {},
    }
    rows = tuple(
        ognet(size, f"{seen}: {se}{graph}", words=clouds[seen], circle=True, kwargs={**gates[se], **kinds[graph]})
        for seen in clouds
        for se in gates
        for graph in kinds
    )
    return Study("graphs", "Graphs with and without SE, of the crop and of the body", rows)


def shortcut(size: Size) -> Study:
    rows = (
        ognet(size, "without", "ognet_deep", circle=True, kwargs={"shortcut": False}, paper={"market": (None, 68.49)}),
        ognet(size, "with", "ognet_deep", circle=True, paper={"market": (None, 72.91)}),
    )
    return Study("shortcut", "Short-cuts of OG-Net-Deep", rows)


def k(size: Size) -> Study:
    rows = tuple(ognet(size, f"k = {of}", kwargs={"k": of}, x=of) for of in size.ks)
    return Study("k", "Neighbours in the graphs of OG-Net-Small", rows, axis="k")


def density(size: Size) -> Study:
    counts = [size.points * times // 8 for times in (2, 4, 6, 8, 12, 16)]
    tests = [Trial(points=count if count != size.points else None) for count in counts]  # as every other study tests it
    rows = tuple(ognet(size, f"{count} points", test=test, x=count) for count, test in zip(counts, tests, strict=True))
    return Study("density", f"Points at test time, {size.points} in training", rows, axis="points of a cloud")


def views(size: Size) -> Study:
    turns = (0, 10, 20, 30, 45, 60, 90)
    clouds = [ognet(size, f"OG-Net-Small, {turn} degrees", test=Trial(turn=turn), x=turn) for turn in turns]
    return Study("views", "Queries' clouds turned about the vertical", (*clouds, *methods(size)), axis="degrees")


def fit(size: Size) -> Study:
    rows = (
        ognet(size, "true bodies", bodies="true"),
        ognet(size, "fitted bodies"),
        ognet(size, "an upright body", bodies="mean"),
    )
    return Study("fit", "Bodies of the clouds", rows)


def postproc(size: Size) -> Study:
    after = {
        "none": Trial(),
        "TLift": Trial(lift=True),
        "RR": Trial(rerank=True),
        "RR, TLift": Trial(rerank=True, lift=True),
    }
    rows = [ognet(size, f"OG-Net-Small, {name}", test=test) for name, test in after.items()]
    rows += [of_2d(size, f"QAConv, {name}", "qaconv50", test=test) for name, test in after.items()]
    return Study("postproc", "Re-ranking and times", tuple(rows))


def plr_osnet(size: Size) -> Study:
    rows = (
        of_2d(size, "without global branch", "plr_osnet", (94.6, 86.9), kwargs={"whole": False}),
        of_2d(size, "an ID loss for each strip", "plr_osnet", (94.4, 85.6), kwargs={"each_strip": True}),
        of_2d(size, "PLR-OSNet", "plr_osnet", (95.6, 88.9)),
    )
    return Study("plr_osnet", "Parts of PLR-OSNet", rows)


def relation(size: Size) -> Study:
    neither = {"relate": False, "contrastive": False}
    rows = [
        of_2d(size, "maxima alone", "relation_s", (93.2, 83.7), kwargs=neither),
        of_2d(size, "relations of parts", "relation_s", (94.2, 86.7), kwargs={"contrastive": False}),
        of_2d(size, "and contrastive pooling", "relation_s", (94.8, 88.0)),
    ]
    if size is not CPU:  # whose images cannot be cut into 4 and 6 strips
        rows += [
            of_2d(size, "three scales, maxima alone", "relation_f", (94.5, 87.3), kwargs=neither),
            of_2d(size, "three scales", "relation_f", (95.2, 88.9)),
        ]
    return Study("relation", "Parts of the relation network", tuple(rows))


def rmgl(size: Size) -> Study:
    """RP: receptive partition; RSA: random shifting, which the recipe of a CPU has not; ABP: balanced pooling."""
    shifts, still = ("--image.shift", "0.5"), ("--image.shift", "0")

    def of(name: str, figures: tuple[float, float], rp: bool, rsa: bool, abp: bool, **kwargs: Any) -> Row:
        kwargs |= {} if rp else {"receptive": False}
        kwargs |= {} if abp else {"abp": "off"}
        return of_2d(size, name, "rmgl", figures, kwargs=kwargs, words=shifts if rsa else still)

    rows = [
        of("2 and 3 parts", (95.5, 87.1), rp=False, rsa=False, abp=False),
        of("RP", (95.7, 88.3), rp=True, rsa=False, abp=False),
        of("RSA", (95.9, 88.3), rp=False, rsa=True, abp=False),
        of("ABP", (95.5, 87.8), rp=False, rsa=False, abp=True),
        of("RP, RSA", (96.1, 89.7), rp=True, rsa=True, abp=False),
        of("RP, RSA, ABP", (96.2, 90.0), rp=True, rsa=True, abp=True),
    ]
    if size is not CPU:  # whose maps of 6 rows cannot be cut into 4
        rows.append(of("2, 3 and 4 parts, RP, RSA, ABP", (96.2, 90.1), True, True, True, partitions=[2, 3, 4]))
    return Study("rmgl", "Parts of RMGL", tuple(rows))


MAKERS = (
    *(inputs, background, models, transfer, components, graphs, shortcut, k, density, views, fit, postproc),
    *(plr_osnet, relation, rmgl),
)
STUDIES: dict[str, Callable[[Size], Study]] = {maker.__name__: maker for maker in MAKERS}


def study(name: str, budget: Budget) -> Study:
    """The study of that name, at that size. Raises: ValueError: unknown name or budget."""
    if name not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    return STUDIES[name](BUDGETS[budget])._replace(budget=budget)
