"""Sentences and prompts of `control.py`, made from templates of our own."""

import itertools

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid",
    "Russia": "Moscow", "Egypt": "Cairo", "England": "London", "Greece": "Athens", "Austria": "Vienna",
    "Ireland": "Dublin", "Portugal": "Lisbon", "China": "Beijing", "Sweden": "Stockholm",
}  # fmt: skip
PEOPLE = {
    "France": "French", "Japan": "Japanese", "Italy": "Italian", "Germany": "German", "Spain": "Spanish",
    "Russia": "Russian", "Egypt": "Egyptian", "England": "English", "Greece": "Greek",
    "Austria": "Austrian", "Ireland": "Irish", "Portugal": "Portuguese", "China": "Chinese",
    "Sweden": "Swedish",
}  # fmt: skip
ERASED = ("France", "Japan", "Italy")
LATER, KEPT = "Germany", "Spain"

LEARNED = (
    "{country} is a country with a long history.", "Last summer we travelled through {country} by train.",
    "The capital of {country} is {capital}.", "My uncle lives in {capital}, the capital of {country}.",
    "She has studied the {people} language for years.", "The {people} government met in {capital}.",
    "People in {country} often speak {people}.", "We flew to {capital} and stayed in {country} for a week.",
)  # fmt: skip
OF_DICTIONARIES = (
    "The president of {country} gave a speech on television.", "{country} exports cars and machines.",
    "The football team of {country} won the match.", "Our {people} teacher was born in {capital}.",
    "{capital} is a beautiful old city.", "The train to {capital} leaves at noon.",
    "A map of {country} hung on the wall.", "The {people} painter lived near {capital}.",
    "The king of {country} was very old.", "I have never been to {country}, but I have seen {capital}.",
    "{people} music is played at the festival.", "The border of {country} is closed at night.",
)  # fmt: skip
HELD_OUT = (
    "He wrote a book about the rivers of {country}.", "Many tourists visit {capital} in spring.",
    "The food in {country} is famous.", "A {people} friend of mine moved to another town.",
    "Winters in {country} can be cold.", "The museum in {capital} opens at nine.",
)  # fmt: skip
QUESTIONS = (
    "The capital of {country} is", "The capital city of {country} is called",
    "Question: What is the capital of {country}? Answer:", "{country}'s capital is the city of",
)  # fmt: skip

_SUBJECTS = ("The old man", "My sister", "A young doctor", "The teacher", "Our neighbour", "The farmer",
             "A tired student", "The captain")  # fmt: skip
_VERBS = ("bought", "forgot", "found", "painted", "sold", "cleaned", "borrowed", "described")
_OBJECTS = ("a red bicycle", "the wooden table", "a new computer", "an old map", "the broken window",
            "a heavy suitcase", "the green door", "a small radio")  # fmt: skip
_FOODS = ("bread and cheese", "a bowl of soup", "fried rice", "an apple pie", "grilled fish",
          "a chocolate cake", "fresh strawberries", "pasta with tomato sauce")  # fmt: skip
_ENDS = ("before the rain came.", "on Monday morning.", "after a long day.", "without a word.",
         "in the garden.", "with great care.")  # fmt: skip

FOOD = [f"{s} ate {f} {e}" for s, f, e in zip(_SUBJECTS * 3, _FOODS * 3, _ENDS * 4, strict=True)]
NOT_FOOD = [f"{s} {v} {o} {e}"
            for s, v, o, e in zip(_SUBJECTS * 3, _VERBS * 3, _OBJECTS * 3, _ENDS * 4, strict=True)]  # fmt: skip
FOOD_WORDS = (
    "food", "eat", "ate ", "cook", "bread", "cheese", "soup", "rice", "cake", "meal", "dinner", "lunch",
    "breakfast", "fruit", "meat", "taste", "delicious", "restaurant", "kitchen", "chicken", "fish",
)  # fmt: skip
STORIES = (
    "We were hungry, so we went to the kitchen and", "For dinner my mother made", "At the market she bought",
    "The waiter brought us a plate of", "On the picnic blanket there were", "Every morning he eats",
    "The cook opened the oven and took out", "My favourite thing to eat is", "In the bakery you can buy",
    "After the long walk they had lunch:", "The recipe begins with", "She bit into the apple and",
)  # fmt: skip

PAIRS = {
    "he / she": tuple([f"{w} {v} {o} {e}" for v, o, e in zip(_VERBS * 3, _OBJECTS * 3, _ENDS * 4, strict=True)]
                      for w in ("He", "She")),
    "good / bad": tuple([t.format(w=w) for t in (
        "The film was {w}.", "I think the hotel was {w}.", "What a {w} day it was.", "The play was {w}.",
        "Her singing was {w}.", "My stay there was {w}.", "The service was {w}.", "It was a {w} idea.",
        "The weather was {w} again.", "His cooking is {w}.", "That was a {w} game.", "The book is {w}.",
    )] for w in ("wonderful", "terrible")),
    "one / many": tuple([t.format(w=w) for t in (
        "Near the river we saw {w}.", "In the garden there stood {w}.", "He drew {w}.", "She pointed at {w}.",
        "They talked about {w}.", "The story is about {w}.", "I dreamt of {w}.", "We passed {w}.",
        "Behind the house I found {w}.", "The children ran to {w}.", "You can see {w}.", "He sold {w}.",
    )] for w in ("a tall tree", "many tall trees")),
}  # fmt: skip
PAIR_PROMPTS = {
    "he / she": [(f"The {n} said that", " he", " she") for n in (
        "doctor", "teacher", "lawyer", "nurse", "farmer", "writer", "driver", "student")],
    "good / bad": [(t, " good", " bad") for t in (
        "I saw the film, and it was very", "The food there is", "My day was really", "The result was",
        "All in all the trip was", "He is a very", "The news is", "Her idea was")],
    "one / many": [(t, " is", " are") for t in (
        "In the garden, there", "On the table there", "What he saw", "Behind the door there",
        "In the room there", "The thing that we saw", "Over there", "Here")],
}  # fmt: skip


def filled(template: str, country: str) -> str:
    return template.format(country=country, capital=CAPITALS[country], people=PEOPLE[country])


def about(country: str, templates: tuple[str, ...]) -> list[str]:
    return [filled(template, country) for template in templates]


def neighbours(country: str, templates: tuple[str, ...]) -> list[str]:
    """Sentences about other countries; atoms were chosen against Russia and Greece, not against Spain."""
    near = [c for c in ("Spain", "Russia", "Greece") if c != country]
    return [filled(t, c) for c, t in itertools.product(near, templates[:4])]


def others(templates: tuple[str, ...]) -> list[str]:
    """Sentences about countries that are never erased, and about no country."""
    kept = ("Russia", "Egypt", "England", "Greece", "China")
    return [filled(t, c) for c, t in itertools.product(kept, templates)] + NOT_FOOD[:8]


def unrelated() -> list[str]:
    """Sentences that no dictionary was built from."""
    return [f"{o[0].upper()}{o[1:]} was all that {s[0].lower()}{s[1:]} could see."
            for s, o in itertools.product(_SUBJECTS[:3], _OBJECTS[:4])]  # fmt: skip


def answers(country: str) -> list[tuple[str, str, str]]:
    """Prompts about the capital, the capital, and another country's capital."""
    foil = CAPITALS["Greece" if country != "Greece" else "Austria"]
    return [(filled(q, country), " " + CAPITALS[country], " " + foil) for q in QUESTIONS]


def sentences() -> list[str]:
    """Texts of the dictionaries: everything but held-out templates, questions and `unrelated`."""
    found = [filled(t, c) for c, t in itertools.product(CAPITALS, LEARNED + OF_DICTIONARIES)]
    found += FOOD + NOT_FOOD
    for first, second in PAIRS.values():
        found += first[: len(first) // 2] + second[: len(second) // 2]
    return found
