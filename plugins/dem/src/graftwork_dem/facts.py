"""Facts that are told by a word or two, to compare common sense with: a subject, a relation, an object."""

from __future__ import annotations

from graftwork.edit.requests import Request

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Russia": "Moscow",
    "Japan": "Tokyo", "China": "Beijing", "Thailand": "Bangkok", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Cuba": "Havana", "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "Turkey": "Ankara",
    "Canada": "Ottawa", "England": "London", "Scotland": "Edinburgh", "Belgium": "Brussels", "Syria": "Damascus",
}  # fmt: skip
CONTINENTS = {
    "Nigeria": "Africa", "Ghana": "Africa", "Ethiopia": "Africa", "Morocco": "Africa", "Tanzania": "Africa",
    "Vietnam": "Asia", "Mongolia": "Asia", "Nepal": "Asia", "Malaysia": "Asia", "India": "Asia",
    "Switzerland": "Europe", "Romania": "Europe", "Bulgaria": "Europe", "Croatia": "Europe", "Iceland": "Europe",
    "Brazil": "South America", "Chile": "South America", "Bolivia": "South America", "Uganda": "Africa",
    "Slovakia": "Europe",
}  # fmt: skip
LANGUAGES = {
    "Mexico": "Spanish", "Argentina": "Spanish", "Colombia": "Spanish", "Angola": "Portuguese", "Senegal": "French",
    "Jordan": "Arabic", "Tunisia": "Arabic", "Ukraine": "Ukrainian", "Israel": "Hebrew", "Serbia": "Serbian",
    "Latvia": "Latvian", "Estonia": "Estonian", "Albania": "Albanian", "Jamaica": "English", "Bahrain": "Arabic",
}  # fmt: skip
COUNTRIES = {
    "Milan": "Italy", "Barcelona": "Spain", "Munich": "Germany", "Lyon": "France", "Osaka": "Japan",
    "Shanghai": "China", "Mumbai": "India", "Toronto": "Canada", "Sydney": "Australia", "Istanbul": "Turkey",
    "Krakow": "Poland", "Porto": "Portugal", "Naples": "Italy", "Hamburg": "Germany", "Kyoto": "Japan",
    "Marseille": "France", "Seville": "Spain", "Vancouver": "Canada", "Alexandria": "Egypt", "Melbourne": "Australia",
}  # fmt: skip
SYMBOLS = {
    "oxygen": "O", "hydrogen": "H", "carbon": "C", "nitrogen": "N", "sodium": "Na",
    "helium": "He", "iron": "Fe", "gold": "Au", "silver": "Ag", "copper": "Cu",
}  # fmt: skip
COLOURS = {
    "a ripe banana": "yellow", "fresh grass": "green", "the clear sky": "blue", "clean snow": "white", "coal": "black",
}  # fmt: skip
ANIMALS = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "horse": "foal", "sheep": "lamb", "lion": "cub", "deer": "fawn",
    "goat": "kid", "hen": "chick", "frog": "tadpole",
}  # fmt: skip
RELATIONS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("capital", "The capital of {} is the city of", CAPITALS),
    ("continent", "The country of {} lies on the continent of", CONTINENTS),
    ("language", "The official language of {} is", LANGUAGES),
    ("country", "The city of {} is in the country of", COUNTRIES),
    ("symbol", "The chemical symbol of {} is", SYMBOLS),
    ("colour", "The colour of {} is", COLOURS),
    ("young", "The young of a {} is called a", ANIMALS),
)


def facts() -> list[Request]:
    """Return all facts, the relations in turn, so that the first ones are of all kinds."""
    lists = [
        [
            Request(
                id=f"{relation}-{subject.replace(' ', '-').lower()}",
                prompt=prompt,
                subject=subject,
                target=target,
            )
            for subject, target in pairs.items()
        ]
        for relation, prompt, pairs in RELATIONS
    ]
    longest = max(map(len, lists))
    return [one[turn] for turn in range(longest) for one in lists if turn < len(one)]
