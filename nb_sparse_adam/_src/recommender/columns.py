# SPDX-License-Identifier: Apache-2.0
"""Which columns of a file have the users, the items, the ratings and the times: as told, or as named."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from nb_sparse_adam.errors import InteractionsError, OptionError, OptionTypeError

# In order of precedence: a tab or "::" never stands in an id by accident, a comma or a space may.
SEPARATORS = {"::": "'::'", "\t": "tab", ";": "semicolon", ",": "comma", " ": "space"}
FORMATS = ("auto", "delimited", "adjacency", "json", "parquet")

# Words of which names of columns are made, without accents. Each may be in the plural, and may have one of
# the endings; several may follow one another, as in `product_sku`.
_USER_WORDS = """
    user uid usr customer cust client buyer purchaser shopper consumer member visitor reviewer rater listener
    viewer reader player borrower subscriber account person guest fan follower patron
    nutzer benutzer anwender kaufer kaeufer kunde kunden besucher mitglied leser horer hoerer spieler
    utilisateur acheteur visiteur membre lecteur usuario cliente comprador visitante miembro membro utente
    acquirente utilizador gebruiker klant koper lid uzytkownik klient пользователь покупатель клиент
    用户 客户 买家 用戶 ユーザー ユーザ 顧客 利用者 会員 사용자 고객
"""
_ITEM_WORDS = """
    item iid movie film product prod sku asin isbn upc ean gtin book track song artist album business article
    anime game goods listing recipe restaurant venue poi place hotel course video show series episode podcast
    news story post app repo beer joke document doc paper offer
    produkt artikel ware gegenstand buch lied titel kunstler kuenstler spiel
    produit livre chanson jeu producto articulo libro pelicula cancion prodotto articolo produto livro filme
    boek towar ksiazka przedmiot товар продукт фильм книга предмет
    商品 物品 产品 產品 电影 アイテム 製品 作品 映画 상품 제품 영화
"""
_RATING_WORDS = """
    rating score star weight value note bewertung puntuacion valoracion ocena оценка 评分 評価 평점
"""
_TIME_WORDS = """
    timestamp time date datetime unixtime unixreviewtime ts createdat eventtime zeitstempel zeit datum
"""
_OTHER_WORDS = """
    day year month reviewtime event eventtype action
    behavior behaviour count plays playcount clicks views price quantity qty amount category genre brand
    review text comment summary tag tags session sessionid order orderid transaction transactionid index row
    unnamed preis menge kategorie
"""
_BEFORE = r"(?:parent|anon(?:ymous|ymized)?|hashed|encoded|original|raw|id|the|my)"
_ENDING = r"(?:id|nr|no|num|nummer|number|code|key|idx|index|hash|uuid|guid|编号|番号)"
_NAMING = r"(?:name|title)"


def _plain(name: str) -> str:
    """Return the letters of a name in lower case without accents; nothing if it has digits, as ids have."""
    decomposed = unicodedata.normalize("NFKD", name.partition(":")[0]).casefold()
    if any(character.isdigit() for character in decomposed):
        return ""
    return "".join(character for character in decomposed if character.isalpha())


def _pattern(words: str, tail: str) -> re.Pattern[str]:
    alternatives = "|".join(sorted({_plain(word) for word in words.split()}, key=len, reverse=True))
    return re.compile(f"{_BEFORE}*(?:(?:{alternatives})(?:e?s)?)+{tail}")


_USERS, _ITEMS = (
    [_pattern(words, tail) for tail in (f"{_ENDING}+", "", f"{_ENDING}*{_NAMING}s?{_ENDING}*")]
    for words in (_USER_WORDS, _ITEM_WORDS)
)
_RATINGS = _pattern(_RATING_WORDS, "")
_TIMES = frozenset(map(_plain, _TIME_WORDS.split()))
_OTHERS = frozenset(map(_plain, _OTHER_WORDS.split())) | _TIMES

Given = str | int | None

_COLUMNS = ("user_column", "item_column", "rating_column", "time_column")
_UNSET = {"sample_weights": False, "times": False}  # of the others it is None


@dataclass(frozen=True)
class ReadOptions:
    """How files are to be read, as `read_interactions` describes it; None: to be found out.

    And, which only `train` wants: the times of interactions, in `time_column`.

    Raises
    ------
    OptionError
        If an option is out of its domain, or cannot work together with another one.
    OptionTypeError
        If one has a type that it cannot have.
    """

    file_format: str = "auto"
    user_column: Given = None
    item_column: Given = None
    rating_column: Given = None
    separator: str | None = None
    header: bool | None = None
    min_rating: float | None = None
    sample_weights: bool = False
    times: bool = False
    time_column: Given = None

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise OptionError(f"file_format: expected one of {', '.join(FORMATS)}, got {self.file_format!r}")
        for name in _COLUMNS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, str | int | None):
                raise OptionTypeError(f"{name}: expected a name or a number from 1, got {value!r}")
            if isinstance(value, int) and value < 1:
                raise OptionError(f"{name}: columns are counted from 1, got {value}")
        if not isinstance(self.header, bool | None):
            raise OptionTypeError(f"header: expected True, False or None, got {self.header!r}")
        object.__setattr__(self, "separator", _separator(self.separator))
        if self.min_rating is not None:
            try:
                finite = math.isfinite(self.min_rating)
            except TypeError as error:
                raise OptionTypeError(f"min_rating: expected a number, got {self.min_rating!r}") from error
            if not finite:
                raise OptionError(f"min_rating: expected a finite number, got {self.min_rating}")
        if not isinstance(self.sample_weights, bool):
            raise OptionTypeError(f"sample_weights: expected True or False, got {self.sample_weights!r}")
        if self.rating_column is not None and not self.ratings:
            raise OptionError(
                "rating_column: ratings are read to leave interactions out or to weigh them; give min_rating "
                "or sample_weights, too"
            )
        if self.file_format in ("adjacency", "json", "parquet"):
            self.refuse_what_has_no_meaning(self.file_format)

    def refuse_what_has_no_meaning(self, file_format: str, file: str = "") -> None:
        """Refuse the options that mean nothing for a format: nothing that was asked for is ignored."""
        meaningless = {
            "adjacency": [*_COLUMNS, "separator", "header", "min_rating", "sample_weights", "times"],
            "json": ["separator", "header"],
            "parquet": ["separator", "header"],
        }.get(file_format, [])  # fmt: skip
        kind = {"adjacency": "adjacency lines have", "json": "JSON lines have", "parquet": "Parquet has"}
        for name in meaningless:
            if getattr(self, name) is not _UNSET.get(name):
                where = f" ({file})" if file else ""
                remedy = "choose --validation X instead of latest" if name == "times" else "leave it out"
                raise OptionError(f"{name}: {kind[file_format]} none{where}; {remedy}")

    @property
    def of_columns(self) -> bool:
        """Whether an option was given that says something about columns."""
        given = [getattr(self, name) for name in (*_COLUMNS, "separator", "header", "min_rating")]
        return any(one is not None for one in given)

    @property
    def ratings(self) -> bool:
        """Whether ratings are needed."""
        return self.min_rating is not None or self.sample_weights


def _separator(given: str | None) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise OptionTypeError(f"separator: expected a string, got {given!r}")
    names = {"comma": ",", "tab": "\t", "semicolon": ";", "space": " ", "pipe": "|", r"\t": "\t"}
    separator = names.get(given, given)
    unfit = not separator or any(one.isalnum() or one in "\"'\r\n\0_-." for one in separator)
    if unfit or (separator != " " and separator.strip(" ") != separator):
        raise OptionError(
            f"separator: expected one of {', '.join(names)}, or characters that no id has, got {given!r}"
        )
    return separator


@dataclass(frozen=True)
class Columns:
    """Where the users, the items and what else is needed are: numbers from 0."""

    user: int
    item: int
    further: dict[str, int] = field(default_factory=dict)  # of "rating" and "time"

    def all(self) -> list[int]:
        """Return those that there are: users, items, and the further ones in their order."""
        return [self.user, self.item, *self.further.values()]


def role(name: str) -> str | None:
    """Say what a name is usual for: ``"user"``, ``"item"``, ``"rating"``, ``"other"``, or None."""
    plain = _plain(name)
    for kind, patterns in (("user", _USERS), ("item", _ITEMS)):
        if any(pattern.fullmatch(plain) for pattern in patterns):
            return kind
    if _RATINGS.fullmatch(plain):
        return "rating"
    return "other" if plain in _OTHERS or not name.strip() else None


def named(names: Sequence[str], kind: str) -> int | None:
    """Return the first of the columns whose names are the most usual for users or items."""
    plain = [_plain(name) for name in names]
    for pattern in _USERS if kind == "user" else _ITEMS:
        for column, one in enumerate(plain):
            if pattern.fullmatch(one):
                return column
    return None


def named_columns(names: Sequence[str]) -> tuple[int, int] | None:
    """Return the columns of users and of items if names say both."""
    user, item = named(names, "user"), named(names, "item")
    return None if user is None or item is None else (user, item)


def named_times(names: Sequence[str]) -> list[int]:
    """Return the columns that have times, as their names say."""
    return [column for column, name in enumerate(names) if _plain(name) in _TIMES]


def find_columns(
    file: str, options: ReadOptions, names: Sequence[str] | None, width: int, ordered: bool = True
) -> Columns:
    """Find the columns that are needed.

    Parameters
    ----------
    file : str
        What errors call the file.
    options : ReadOptions
        What is given there is taken.
    names : sequence of str, optional
        The names of the columns, if they have any.
    width : int
        How many columns there are.
    ordered : bool
        Whether columns have places, so that the first two are users and items where nothing says otherwise.
    """
    user, item, rating, time = (
        resolve(file, option, getattr(options, option), names, width, ordered) for option in _COLUMNS
    )
    if names is not None:
        if user is None:
            user = named([name if at != item else "" for at, name in enumerate(names)], "user")
        if item is None:
            item = named([name if at != user else "" for at, name in enumerate(names)], "item")
    if user is None or item is None:
        user, item = _by_place(file, names, width, ordered, user, item)
    if user == item:
        raise OptionError(f"{file}: user_column and item_column are the same column; expected two")
    further: dict[str, int] = {}
    if options.ratings:
        rated = [at for at, name in enumerate(names or ()) if role(name) == "rating"]
        if rating is None and len(rated) != 1:
            option = "sample_weights" if options.min_rating is None else "min_rating"
            raise OptionError(
                f"{option}: {file} has {_listed(names, width)}, {'several' if rated else 'none'} of them "
                f"named as ratings are; name one with --rating-column"
            )
        further["rating"] = rated[0] if rating is None else rating
    if options.times:
        timed = named_times(names or ())
        if time is None and not timed:
            raise OptionError(
                f"times: {file} has {_listed(names, width)}, none of them named as times are; name one with "
                f"--time-column"
            )
        further["time"] = timed[0] if time is None else time
    for kind, column in further.items():
        if column in (user, item):
            raise OptionError(f"{file}: the {kind}_column has users or items; expected another one")
    if len(set(further.values())) < len(further):
        raise OptionError(f"{file}: rating_column and time_column are the same column; expected two")
    return Columns(user, item, further)


def _by_place(
    file: str, names: Sequence[str] | None, width: int, ordered: bool, user: int | None, item: int | None
) -> tuple[int, int]:
    """Complete the columns of users and items from what may be one of them."""
    rest = [at for at in range(width) if at not in (user, item)]
    if names is not None:
        rest = [at for at in rest if role(names[at]) is None] or rest
    if user is None and item is None:
        if ordered and rest[:2] == [0, 1]:
            return 0, 1
        if ordered and len(rest) == 2:
            return rest[0], rest[1]
        missing = "the users and which the items; say it with --user-column and --item-column"
    elif user is None:
        if len(rest) == 1 or (ordered and item == 1 and 0 in rest):
            return rest[0], item or 0
        missing = "the users; say it with --user-column"
    else:
        if len(rest) == 1 or (ordered and user == 0 and 1 in rest):
            return user, rest[0]
        missing = "the items; say it with --item-column"
    raise InteractionsError(f"{file}: has {_listed(names, width)}; cannot tell which of them has {missing}")


def resolve(
    file: str, option: str, given: Given, names: Sequence[str] | None, width: int, ordered: bool
) -> int | None:
    """Return the column that an option names or counts from 1."""
    if given is None:
        return None
    if isinstance(given, str) and names is not None:
        for same in (str, str.casefold):
            found = [at for at, name in enumerate(names) if same(name.strip()) == same(given.strip())]
            if found:
                return found[0]
    number = given if isinstance(given, int) else int(given) if re.fullmatch("[0-9]{1,9}", given) else 0
    if ordered and 1 <= number <= width:
        return number - 1
    remedy = "; it has no header, so give a number" if names is None else ""
    remedy = remedy if ordered else "; keys are given by name"
    raise OptionError(f"{option}: {file} has {_listed(names, width)}, but not {given!r}{remedy}")


def _listed(names: Sequence[str] | None, width: int) -> str:
    if not names:
        return f"{width} columns"
    return "the columns " + ", ".join(map(shown, names[:30])) + (", ..." if len(names) > 30 else "")


def shown(name: str) -> str:
    """Return a name in quotes, cut if it is long."""
    return repr(name if len(name) <= 40 else name[:37] + "...")


def what_was_taken(columns: Columns, names: Sequence[str] | None) -> str:
    """Say which columns were taken, by name if they have one of their own."""

    def one(column: int) -> str:
        name = names[column] if names is not None and column < len(names) else ""
        unique = name.strip() and list(names or ()).count(name) == 1
        return shown(name) if unique else f"column {column + 1}"

    every = {"user": columns.user, "item": columns.item, **columns.further}
    return ", ".join(f"{kind}s in {one(column)}" for kind, column in every.items())
