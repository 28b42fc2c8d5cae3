"""The tables of docs/control.md, from the figures of `control.py`.

python benchmarks/control_tables.py [--out FOLDER]
"""

import argparse
from pathlib import Path
from typing import Any

from results import Results

Row = dict[str, Any]


def mean(effects: Row, name: str, figure: str) -> float:
    return effects[name][figure][0]


def line(*cells: Any) -> None:
    print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")


def head(*cells: str) -> None:
    line(*cells)
    line(*["---"] * len(cells))


def itd(rows: list[Row], rivals: list[Row], later: list[Row]) -> None:
    print("\nGate: AUC against near neighbours / unrelated; share of inputs at which it opens\n")
    head(
        "concept", "atoms chosen by", "AUC near", "AUC unrelated", "opens: held out", "near", "unrelated"
    )
    for r in rows:
        if "error" in r:
            print(r["concept"], r["by"], r["error"])
    rows = [r for r in rows if "error" not in r]
    for r in rows:
        if r["factor"] == -2.0:
            line(r["concept"], r["by"], r["auc_near"], r["auc_far"], *r["opens"])
    for r in rivals:
        line(r["concept"], "random atoms", r["random"]["auc_near"], r["random"]["auc_far"], "", "", "")
        line(r["concept"], "means", r["means"]["auc_near"], r["means"]["auc_far"], "", "", "")
    print("\nErasure: probability of the capital, and KL on other text\n")
    head("concept", "by", "factor", "plain", "gated", "ungated", "random atoms", "means", "KL gated",
         "KL ungated", "KL where shut")  # fmt: skip
    for r in rows:
        g, u = r["gated"], r["ungated"]
        line(
            r["concept"], r["by"], r["factor"], mean(g, "nothing", "probability"),
            mean(g, "edit", "probability"), mean(u, "edit", "probability"),
            mean(g, "random atoms", "probability"), mean(g, "difference in means", "probability"),
            mean(g, "edit", "KL"), mean(u, "edit", "KL"), r["kl_where_shut"],
        )  # fmt: skip
    for r in later:
        print("\nSeveral at once: probability of the capital, plain and edited\n")
        head("country", "plain", "three erased", "four erased")
        for name in (n.partition(": ")[2] for n in r if n.startswith("three: ")):
            line(name, r[f"three: {name}"][0], r[f"three: {name}"][1], r[f"four: {name}"][1])


def tiers(rows: list[Row]) -> None:
    print("\nTiers: concept rate / perplexity / distinct-2 of generations; KL and accuracy elsewhere\n")
    head("atoms", "tier", "amount", "concept", "perplexity", "distinct-2", "KL", "accuracy",
         "random: concept", "perplexity", "means: concept", "perplexity")  # fmt: skip
    for r in rows:
        e = r["effects"]
        own = [mean(e, "edit", f) for f in ("concept", "perplexity", "distinct-2", "KL", "accuracy")]
        others = [mean(e, n, f) for n in ("random atoms", "difference in means")
                  for f in ("concept", "perplexity")]  # fmt: skip
        line(r["d_sae"], r["tier"], r["amount"], *own, *others)


def sauce(rows: list[Row]) -> None:
    print("\nSAUCE: probability of the capital; other countries; KL\n")
    head("layer", "by", "gamma", "target", "random atoms", "means", "others, plain", "others", "KL near")
    for r in rows:
        e, o = r["effects"], r["others"]
        names = ("edit", "random atoms", "difference in means")
        line(
            r["at"], r["by"], r["gamma"], *(mean(e, n, "probability") for n in names),
            *(mean(o, n, "probability") for n in ("nothing", "edit")), mean(e, "edit", "KL"),
        )  # fmt: skip


def signed(pairs: list[Row], clamps: list[Row]) -> None:
    print("\nOne atom on minimal pairs: AUC\n")
    head("pair", "atom from", "atom", "positive part", "means", "random atoms")
    for r in pairs:
        scores = [r[f"auc_{n}"] for n in ("atom", "positive_part", "means", "random_atoms")]
        line(r["pair"], r["atom"][1], *scores)
    print("\nClamped: logit difference (first less second), and KL elsewhere\n")
    head("pair", "value", "plain", "atom", "random atoms", "means", "KL atom", "KL means")
    for r in clamps:
        e = r["effects"]
        names = ("nothing", "edit", "random atoms")
        line(
            r["pair"], r["value"], *(mean(e, n, "logit difference") for n in names),
            r["means"]["logit difference"][0], mean(e, "edit", "KL"), r["means"]["KL"][0],
        )  # fmt: skip


def exemplar(rows: list[Row]) -> None:
    print("\nExemplar ablation: probability of the capital; KL near\n")
    head("concept", "atoms", "way", "plain", "edit", "random atoms", "means", "KL near")
    for r in rows:
        e = r["effects"]
        names = ("nothing", "edit", "random atoms", "difference in means")
        line(r["concept"], r["count"], r["way"], *(mean(e, n, "probability") for n in names),
             mean(e, "edit", "KL"))  # fmt: skip


def ioi(able: list[Row], rows: list[Row]) -> None:
    for r in able:
        print("\n", {k: v for k, v in r.items() if k not in ("system", "layer", "k")})
    print("\nIOI\n")
    head("dictionary", "sufficiency", "necessity", "FVU", "L0", "F1 IO", "F1 S", "F1 Pos", "split")
    for r in rows:
        line(r["dictionary"], *(r[n] for n in ("sufficiency", "necessity", "fvu", "l0")),
             *r["f1"].values(), r["split"])  # fmt: skip
    print("\nShare of prompts edited: IO, S, Pos\n")
    head("dictionary", "changed", "nothing", "k=2", "k=4", "k=8")
    for r in rows:
        for attribute in ("IO", "S", "Pos"):
            line(r["dictionary"], attribute, *r[attribute].values())


def recsae(rows: list[Row]) -> None:
    print("\nRecommender: rates after over rates before\n")
    head("seed", "own category", "other categories", "own, random atoms", "FVU")
    for r in rows:
        line(r["seed"], r["own"], r["other"], r["random_own"], r["fvu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("control-results"))
    rows = Results(parser.parse_args().out).rows

    def of(system: str) -> list[Row]:
        return [row for row in rows if row["system"] == system]

    itd(of("itd"), of("itd-rivals"), of("itd-later"))
    exemplar(of("exemplar"))
    signed(of("signed"), of("signed-clamp"))
    sauce(of("sauce"))
    tiers(of("tiers"))
    ioi(of("ioi-able"), of("ioi"))
    recsae(of("recsae"))


if __name__ == "__main__":
    main()
