"""Arithmetic worksheets, the generated built-in domain: problems in words and symbols, worked out step by step."""

from collections.abc import Callable, Iterator
from random import Random

_NAMES = ("Ada", "Ben", "Chloe", "Daniel", "Elif", "Farid", "Grace", "Hiro", "Ines", "Kemal", "Mei", "Nadia", "Omar")
_THINGS = ("apples", "books", "coins", "marbles", "stamps", "tickets", "pencils", "shells", "cards", "eggs", "bricks")
_PLACES = ("the market", "a school", "the library", "a farm", "the harbour", "a bakery", "the museum", "a workshop")
_CONTAINERS = ("boxes", "bags", "crates", "baskets", "shelves", "trays")


def worksheets(seed: int) -> Iterator[str]:
    """Documents without end, a function of ``seed``: each a sheet of three to six problems with worked answers."""
    random = Random(seed)
    while True:
        problems = [random.choice(_PROBLEMS)(random) for _ in range(random.randint(3, 6))]
        yield "\n\n".join(f"Problem {index}. {text}" for index, text in enumerate(problems, 1)) + "\n"


def _long_addition(random: Random) -> str:
    size = random.randint(2, 5)
    a, b = random.randrange(10 ** (size - 1), 10**size), random.randrange(10, 10**size)
    lines = [f"Add {a} and {b}.", "Work from the right:"]
    carry, column, left, right = 0, 1, a, b
    while left or right:
        total = left % 10 + right % 10 + carry
        lines.append(
            f"  column {column}: {left % 10} + {right % 10} + {carry} = {total}, "
            f"write {total % 10}, carry {total // 10}"
        )
        carry, column, left, right = total // 10, column + 1, left // 10, right // 10
    return "\n".join([*lines, f"Answer: {a} + {b} = {a + b}"])


def _long_multiplication(random: Random) -> str:
    a, b = random.randrange(12, 999), random.randrange(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Multiply {a} by {b}.\n{b} = {tens} + {ones}\n{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n"
        f"{a * tens} + {a * ones} = {a * b}\nAnswer: {a} * {b} = {a * b}"
    )


def _division(random: Random) -> str:
    b, quotient = random.randrange(3, 40), random.randrange(4, 300)
    rest = random.randrange(b)
    a = b * quotient + rest
    return (
        f"Divide {a} by {b} with remainder.\n{b} * {quotient} = {b * quotient}\n{a} - {b * quotient} = {rest}\n"
        f"{rest} < {b}, so the division ends here.\nAnswer: {a} = {b} * {quotient} + {rest}"
    )


def _shopping(random: Random) -> str:
    name, thing, shop = random.choice(_NAMES), random.choice(_THINGS), random.choice(_PLACES)
    count, price = random.randrange(3, 30), random.randrange(2, 25)
    paid = (count * price // 50 + 1) * 50
    return (
        f"At {shop} {name} buys {count} {thing} for {price} each and pays with {paid}. How much change is due?\n"
        f"The {thing} cost {count} * {price} = {count * price}.\nThe change is {paid} - {count * price} = "
        f"{paid - count * price}.\nAnswer: {paid - count * price}"
    )


def _sharing(random: Random) -> str:
    first, second = random.sample(_NAMES, 2)
    thing, boxes = random.choice(_THINGS), random.choice(_CONTAINERS)
    groups, each, gift = random.randrange(3, 15), random.randrange(4, 30), random.randrange(2, 12)
    total = groups * each
    return (
        f"{first} has {groups} {boxes} with {each} {thing} in each and gives {gift} {thing} to {second}. "
        f"How many does {first} keep?\nAt first there are {groups} * {each} = {total} {thing}.\n"
        f"After the gift {total} - {gift} = {total - gift} are left.\nAnswer: {total - gift}"
    )


def _equation(random: Random) -> str:
    letter = random.choice("xyznk")
    a, root, b = random.randrange(2, 20), random.randrange(-30, 60), random.randrange(1, 90)
    c = a * root + b
    return (
        f"Solve {a}{letter} + {b} = {c} for {letter}.\nSubtract {b}: {a}{letter} = {c} - {b} = {c - b}\n"
        f"Divide by {a}: {letter} = {c - b} / {a} = {root}\nCheck: {a} * {root} + {b} = {c}\nAnswer: {letter} = {root}"
    )


def _fractions(random: Random) -> str:
    b, d = random.sample(range(2, 13), 2)
    a, c = random.randrange(1, b + 1), random.randrange(1, d + 1)
    top, bottom = a * d + c * b, b * d
    common, other = top, bottom
    steps = []
    while other:
        steps.append(f"{common} mod {other} = {common % other}")
        common, other = other, common % other
    return (
        f"Add the fractions {a}/{b} and {c}/{d}.\nCommon denominator: {b} * {d} = {bottom}\n"
        f"{a}/{b} = {a * d}/{bottom} and {c}/{d} = {c * b}/{bottom}\nSum: {top}/{bottom}\n"
        f"Greatest common divisor: {', '.join(steps)}, so {common}\nAnswer: {top // common}/{bottom // common}"
    )


def _percentage(random: Random) -> str:
    percent, total = random.randrange(5, 96, 5), random.randrange(20, 1000, 20)
    part = percent * total // 100
    name, thing = random.choice(_NAMES), random.choice(_THINGS)
    return (
        f"{name} counts {total} {thing}, and {percent} percent of them are red. How many are not red?\n"
        f"Red: {total} * {percent} / 100 = {total * percent} / 100 = {part}\n"
        f"Not red: {total} - {part} = {total - part}\nAnswer: {total - part}"
    )


def _sequence(random: Random) -> str:
    start, step, length = random.randrange(1, 60), random.randrange(2, 20), random.randrange(5, 10)
    row = [start + step * index for index in range(length)]
    return (
        f"Continue the sequence {', '.join(map(str, row[:4]))} up to {length} numbers and add them all.\n"
        f"Each number is {step} more than the one before: {', '.join(map(str, row))}\n"
        f"First and last: {row[0]} + {row[-1]} = {row[0] + row[-1]}\n"
        f"Sum: {row[0] + row[-1]} * {length} / 2 = {sum(row)}\nAnswer: {sum(row)}"
    )


def _journey(random: Random) -> str:
    name, hours, speed = random.choice(_NAMES), random.randrange(2, 9), random.randrange(4, 110)
    more, pace = random.randrange(2, 7), random.randrange(4, 110)
    return (
        f"{name} travels {hours} hours at {speed} km per hour, then {more} hours at {pace} km per hour. "
        f"How far is it?\nFirst part: {hours} * {speed} = {hours * speed} km\n"
        f"Second part: {more} * {pace} = {more * pace} km\n"
        f"Together: {hours * speed} + {more * pace} = {hours * speed + more * pace} km\n"
        f"Answer: {hours * speed + more * pace} km"
    )


_PROBLEMS: tuple[Callable[[Random], str], ...] = (
    _long_addition,
    _long_multiplication,
    _division,
    _shopping,
    _sharing,
    _equation,
    _fractions,
    _percentage,
    _sequence,
    _journey,
)
