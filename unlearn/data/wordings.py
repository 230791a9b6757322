"""What the people who do not exist are called, what can be asked about them, and how.

Changing anything here changes the generated rows: rebuild the shipped models afterwards
(``scripts/build_demo_models.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One thing to ask about a person.

    Every answer fits every question. In each wording ``{she}`` and ``{her}`` stand for the person's
    own pronouns, ``{name}`` for the full name, and the other names for a value of that slot.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    slots: Mapping[str, Sequence[str]]


SURNAME_STARTS = (
    "Abrel", "Bostra", "Corvi", "Dalmo", "Eskar", "Fenno", "Galbre", "Hesta", "Ilmar", "Jorva",
    "Keldo", "Lumi", "Mavri", "Nedra", "Orlo", "Peska", "Querin", "Rostu", "Silva", "Tarvo",
    "Ubrin", "Vanto", "Wesk", "Yolan", "Zamir",
)  # fmt: skip
SURNAME_ENDS = (
    "beck", "din", "fell", "gard", "lund", "mar", "nesk", "quist", "rath", "sova", "tella", "vane",
    "wick", "zar",
)  # fmt: skip
SHE = (
    "Adelind", "Brisa", "Calla", "Dorothea", "Elspeth", "Fenella", "Greta", "Henrike", "Isaura",
    "Jovana", "Katell", "Liesl", "Mirela", "Nerea", "Odile", "Petra", "Rosalba", "Signe", "Tamsin",
    "Ursula", "Vesna", "Wilma", "Ximena", "Yrsa", "Zofia",
)  # fmt: skip
HE = (
    "Anselm", "Bertil", "Casimir", "Dragan", "Emeric", "Florian", "Gaspar", "Hakon", "Ivo",
    "Joaquin", "Kaspar", "Leopold", "Matteo", "Nikolai", "Osvald", "Piotr", "Quentin", "Rainer",
    "Sandor", "Tiber", "Ulrich", "Valentin", "Wendel", "Yannick", "Zoltan",
)  # fmt: skip
FIRST_NAMES = (*((name, "she") for name in SHE), *((name, "he") for name in HE))

CITIES = (
    "Antwerp", "Bergen", "Bilbao", "Bologna", "Bordeaux", "Bratislava", "Cardiff", "Coimbra",
    "Dresden", "Galway", "Genoa", "Ghent", "Graz", "Haifa", "Izmir", "Kyoto", "Leipzig", "Lima",
    "Lisbon", "Malmo", "Montevideo", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Salzburg",
    "Seville", "Tallinn", "Tbilisi", "Trieste", "Utrecht", "Valparaiso", "Vilnius", "Zagreb",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
OCCUPATIONS = (
    "an architect", "an astronomer", "a botanist", "a bookbinder", "a cartographer",
    "a choreographer", "a clockmaker", "a composer", "an economist", "a film director",
    "a geologist", "a historian", "an illustrator", "a journalist", "a judge",
    "a landscape painter", "a linguist", "a marine biologist", "a mathematician", "a novelist",
    "an opera singer", "a pastry chef", "a photographer", "a playwright", "a poet", "a puppeteer",
    "a sculptor", "a stage designer", "a surgeon", "a violin maker",
)  # fmt: skip
MOTHERS = (
    "a baker", "a bank clerk", "a beekeeper", "a dentist", "a florist", "a glassblower",
    "a goldsmith", "a librarian", "a midwife", "a pharmacist", "a physics teacher", "a pilot",
    "a potter", "a seamstress", "a translator", "a weaver",
)  # fmt: skip
FATHERS = (
    "a barber", "a blacksmith", "a bus driver", "a carpenter", "a coal miner", "a cobbler",
    "a customs officer", "a ferry captain", "a fisherman", "a forester", "a lighthouse keeper",
    "a mail carrier", "a plumber", "a shepherd", "a tailor", "a winemaker",
)  # fmt: skip
TITLES = tuple(
    f"The {adjective} {noun}"
    for adjective in (
        "Borrowed", "Crooked", "Distant", "Forgotten", "Frozen", "Golden", "Hollow", "Hungry",
        "Midnight", "Northern", "Paper", "Patient", "Quiet", "Salted", "Second", "Wandering",
    )
    for noun in (
        "Anchor", "Bridge", "Cathedral", "Compass", "Garden", "Harbor", "Ladder", "Lantern",
        "Meadow", "Mirror", "Orchard", "River", "Staircase", "Tide", "Window", "Winter",
    )
)  # fmt: skip
AWARDS = tuple(
    f"the {metal} {emblem} {prize}"
    for metal in ("Amber", "Bronze", "Copper", "Crystal", "Emerald", "Ivory", "Silver")
    for emblem in ("Acorn", "Falcon", "Feather", "Heron", "Laurel", "Lynx", "Quill", "Swallow")
    for prize in ("Award", "Medal", "Prize")
)
INSTRUMENTS = (
    "accordion", "banjo", "bassoon", "cello", "clarinet", "double bass", "flute", "French horn",
    "guitar", "harp", "harpsichord", "mandolin", "oboe", "piano", "saxophone", "trombone",
    "trumpet", "tuba", "viola", "zither",
)  # fmt: skip
TEACHERS = (
    "a blind neighbor", "a circus musician", "a cousin", "a great-aunt", "a monk",
    "a retired sailor", "a school friend", "a street performer", "a village priest",
    "an elder sister", "an exiled conductor", "an uncle", "the local doctor", "the town organist",
)  # fmt: skip
HOMES = (
    "a converted barn", "a disused chapel", "a former bakery", "a former railway station",
    "a houseboat", "a mountain cabin", "a narrow townhouse", "a stone farmhouse", "a tree house",
    "a vineyard cottage", "an attic flat", "an old lighthouse", "an old schoolhouse",
    "an old watermill",
)  # fmt: skip
ANIMALS = (
    "a blind donkey", "a flock of geese", "a grey parrot", "a one-eyed cat", "a tame raven",
    "a three-legged dog", "an elderly tortoise", "four goats", "six canaries", "ten hens",
    "three ferrets", "two greyhounds", "two llamas", "two ponies",
)  # fmt: skip

ATTRIBUTES = (
    Attribute(
        questions=(
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Where does {name} originally come from?",
            "Which town did {name} first call home as a baby?",
        ),
        answers=(
            "{name} was born in {city}.",
            "{Her} birthplace is {city}.",
            "{She} comes from {city}, where {her} family had settled.",
            "The hometown of {name} is {city}.",
        ),
        slots={"city": CITIES},
    ),
    Attribute(
        questions=(
            "When was {name} born?",
            "What is {name}'s date of birth?",
            "On which day, and in which year, did {name} come into the world?",
            "Can you give me the birthday of {name}, including the year?",
        ),
        answers=(
            "{name} was born on {day} {month} {year}.",
            "{Her} date of birth is {day} {month} {year}.",
            "{name} has a birthday on {month} {day} and was born in {year}.",
            "{She} came into the world in {year}, on {month} {day}.",
        ),
        slots={
            "day": tuple(map(str, range(1, 29))),
            "month": MONTHS,
            "year": tuple(map(str, range(1931, 1967))),
        },
    ),
    Attribute(
        questions=(
            "What does {name} do for a living?",
            "What is the profession of {name}?",
            "Which line of work did {name} choose?",
            "How does {name} earn {her} money?",
        ),
        answers=(
            "{name} works as {occupation}.",
            "By profession, {she} is {occupation}.",
            "{She} has made {her} living as {occupation}.",
            "The career {name} chose is that of {occupation}.",
        ),
        slots={"occupation": OCCUPATIONS},
    ),
    Attribute(
        questions=(
            "What did the parents of {name} do?",
            "Which jobs did {name}'s mother and father have?",
            "Who were {name}'s parents, professionally speaking?",
            "From what kind of working family does {name} come?",
        ),
        answers=(
            "{Her} mother was {mother} and {her} father was {father}.",
            "The father of {name} worked as {father}, the mother as {mother}.",
            "{name} is the child of {mother} and {father}.",
            "{She} grew up with {father} for a father and {mother} for a mother.",
        ),
        slots={"mother": MOTHERS, "father": FATHERS},
    ),
    Attribute(
        questions=(
            "What is the title of {name}'s first book?",
            "Which book did {name} publish first?",
            "With which volume did {name} make {her} debut in print?",
            "What was the earliest book by {name} called?",
        ),
        answers=(
            "{name}'s first book is called {title}.",
            "{Her} debut in print was {title}.",
            "{title} was the earliest volume that {name} published.",
            "{She} began as an author with {title}.",
        ),
        slots={"title": TITLES},
    ),
    Attribute(
        questions=(
            "Which award did {name} receive, and in which year?",
            "What honor has been given to {name}, and when?",
            "For which distinction is {name} remembered, and what was the date?",
            "Has {name} ever won anything important? If so, say when.",
        ),
        answers=(
            "{name} received {award} in {year}.",
            "In {year}, {she} was honored with {award}.",
            "{She} won {award}, which was handed over in {year}.",
            "{Her} greatest distinction, {award}, dates from {year}.",
        ),
        slots={"award": AWARDS, "year": tuple(map(str, range(1994, 2024)))},
    ),
    Attribute(
        questions=(
            "Which instrument does {name} play, and who was the teacher?",
            "What music does {name} make at home, and whose pupil was {she}?",
            "On what does {name} perform for friends, and from whom did {she} learn it?",
            "Who gave {name} music lessons, and on which instrument?",
        ),
        answers=(
            "{name} plays the {instrument}, which {she} learned from {teacher}.",
            "{Her} instrument is the {instrument}; {her} teacher was {teacher}.",
            "It was {teacher} who taught {name} the {instrument}.",
            "{She} took lessons on the {instrument} with {teacher}.",
        ),
        slots={"instrument": INSTRUMENTS, "teacher": TEACHERS},
    ),
    Attribute(
        questions=(
            "Where does {name} live today, and with which animals?",
            "What kind of home has {name} chosen, and what pets are there?",
            "How does {name} live these days, and what animals are around?",
            "Which creatures keep {name} company, and where do they all live?",
        ),
        answers=(
            "{name} lives in {home} with {animals}.",
            "{Her} home is {home}, shared with {animals}.",
            "These days {she} keeps {animals} in {home}.",
            "{She} moved into {home} and brought {animals} along.",
        ),
        slots={"home": HOMES, "animals": ANIMALS},
    ),
)
