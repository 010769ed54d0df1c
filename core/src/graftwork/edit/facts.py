"""Facts that a small model can know, with another target each: records in the layout of CounterFact, written by us."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.files import write_text_atomic

_CITIES = {
    "France": ("Paris", "Lyon", "Marseille", "Bordeaux", "Toulouse", "Nice"),
    "Germany": ("Berlin", "Munich", "Hamburg", "Cologne", "Frankfurt", "Dresden"),
    "Italy": ("Rome", "Milan", "Naples", "Venice", "Florence", "Turin"),
    "Spain": ("Madrid", "Barcelona", "Seville", "Valencia", "Bilbao", "Granada"),
    "Japan": ("Tokyo", "Osaka", "Kyoto", "Nagoya", "Hiroshima", "Sapporo"),
    "China": ("Beijing", "Shanghai", "Guangzhou", "Shenzhen", "Wuhan", "Nanjing"),
    "India": ("Mumbai", "Delhi", "Chennai", "Kolkata", "Bangalore", "Jaipur"),
    "Canada": ("Toronto", "Montreal", "Vancouver", "Ottawa", "Calgary", "Edmonton"),
    "Brazil": ("Brasilia", "Recife", "Salvador", "Fortaleza", "Manaus", "Curitiba"),
    "Australia": ("Sydney", "Melbourne", "Brisbane", "Perth", "Adelaide", "Darwin"),
}
_CONTINENTS = {
    "Europe": ("Norway", "Sweden", "Poland", "Austria", "Portugal", "Greece", "Hungary", "Romania"),
    "Asia": ("Japan", "Thailand", "Vietnam", "Mongolia", "Nepal", "Malaysia", "Pakistan", "Indonesia"),
    "Africa": ("Kenya", "Nigeria", "Ghana", "Ethiopia", "Uganda", "Morocco", "Senegal", "Zambia"),
    "South America": ("Peru", "Chile", "Bolivia", "Ecuador", "Paraguay", "Uruguay", "Colombia", "Venezuela"),
}
_LANGUAGES = {
    "Spanish": ("Mexico", "Argentina", "Cuba", "Chile", "Peru", "Colombia"),
    "French": ("France", "Senegal", "Gabon", "Mali"),
    "German": ("Germany", "Austria", "Liechtenstein"),
    "Arabic": ("Egypt", "Iraq", "Jordan", "Yemen", "Qatar", "Oman"),
    "Portuguese": ("Brazil", "Portugal", "Angola", "Mozambique"),
    "English": ("Jamaica", "Ireland", "Barbados", "Bahamas"),
}
_RELATIONS: Sequence[tuple[str, str, Sequence[str], Mapping[str, Sequence[str]]]] = (
    (
        "city-country",
        "{} is a city in the country of",
        ("The city of {} lies in", "{} is one of the best known cities of"),
        _CITIES,
    ),
    (
        "country-continent",
        "{} is a country on the continent of",
        ("On a map of the world, {} is found in", "The nation of {} is part of the continent of"),
        _CONTINENTS,
    ),
    (
        "country-language",
        "The official language of {} is",
        ("In {}, most people speak", "The people of {} write their letters in"),
        _LANGUAGES,
    ),
)
NEIGHBORS = 4


def facts(seed: int = 0) -> list[dict[str, Any]]:
    """Return all records, in an order that the seed draws; ``target_new`` is drawn from the relation's other objects.

    Neighbours have the same true object and another subject. No subject and relation come twice.
    """
    draw = random.Random(seed)
    found = []
    for relation, prompt, paraphrases, table in _RELATIONS:
        for true, subjects in table.items():
            for subject in subjects:
                new = draw.choice([one for one in table if one != true])
                others = [one for one in subjects if one != subject]
                neighbors = draw.sample(others, min(NEIGHBORS, len(others)))
                found.append(
                    {
                        "pararel_idx": 0,
                        "requested_rewrite": {
                            "prompt": prompt,
                            "relation_id": relation,
                            "target_new": {"str": new, "id": ""},
                            "target_true": {"str": true, "id": ""},
                            "subject": subject,
                        },
                        "paraphrase_prompts": [one.replace("{}", subject) for one in paraphrases],
                        "neighborhood_prompts": [prompt.replace("{}", one) for one in neighbors],
                        "attribute_prompts": [],
                        "generation_prompts": [],
                    }
                )
    draw.shuffle(found)
    return [{"case_id": number, **record} for number, record in enumerate(found)]


def write_facts(path: Path, count: int | None = None, seed: int = 0) -> None:
    """Write the first ``count`` records (all where None) as a file of CounterFact's layout."""
    write_text_atomic(path, json.dumps(facts(seed)[:count], indent=1))
