"""Tomorrow's weather from those who know it: the model asks the Japan Meteorological Agency.

The caller asks 「明日の東京の天気は？」; the model calls `weather_forecast` and says what the
agency forecasts and when it issued that. Any prefecture, city, town or village of Japan will do, in
kanji, kana or romaji; a name that several places have is asked back. When no forecast can be had in
3 s, the model is told so, and told to invent none.

    WEATHER_URL    where the agency's documents are, for a mirror or a test. Not set:
                   https://www.jma.go.jp/bosai

Nothing is written to disk; documents are kept in memory for ten minutes. They may be used if the
source is named, as every result does (出典：気象庁ホームページ). Nobody promises that they stay:
expect absence, delay and change.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import unicodedata
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from datetime import date, datetime, timedelta, timezone
from os.path import commonprefix
from typing import Annotated, Any, Literal, NamedTuple, get_args

log = logging.getLogger("weather")

URL = os.environ.get("WEATHER_URL", "").strip().rstrip("/") or "https://www.jma.go.jp/bosai"
if not URL.startswith(("https://", "http://")):
    sys.exit(f"WEATHER_URL is {URL!r}: give an address that begins with https:// or http://")
LIMIT_S = 3.0  # for both documents together: the caller hears silence meanwhile
KEEP_S = 600.0
MAX_BYTES = 4_000_000  # of one document; the list of areas has 258 kB
MAX_AGE = timedelta(hours=24)  # issued at 5, 11 and 17 o'clock: what is older is not today's
JST = timezone(timedelta(hours=9))  # Japan has no summer time
NO_FORECAST = "There is no forecast now. Tell the caller so. Do not guess or invent any weather."

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
Day = Literal["today", "tomorrow", "day_after_tomorrow", Weekday]


def weather_forecast(
    call: Any,
    place: Annotated[
        str, "Prefecture, city, town or village in Japan. If its name is not unique: 広島県府中市"
    ],
    day: Annotated[Day, "By the date in Japan. A weekday means the next one, or today"] = "today",
) -> dict[str, Any] | str:
    """The Japan Meteorological Agency's forecast for a place in Japan: any day within a week.

    Always use this when weather is asked for; never answer from memory. Say that it is the
    agency's (気象庁) forecast and when it was issued. null means that the agency does not say.
    Temperatures are forecast for the named station.
    """
    try:
        return forecast(place, day, now())
    except Exception as error:  # no network, too slow, not JSON, of another form
        why = f"{type(error).__name__}: {error}"
        log.warning("no forecast from %s: %s", URL, why, extra={"call": call.sid})
        return NO_FORECAST


def now() -> datetime:
    return datetime.now(JST)


def forecast(place: str, day: str, at: datetime) -> dict[str, Any] | str:
    deadline = time.monotonic() + LIMIT_S
    places = document("/common/const/area.json", read_places, deadline)
    found = find(place, places)
    if not found:
        return f"There is no forecast for {place}. Ask for a city or prefecture, like 東京都."
    if len(found) > 1:
        meant = [one.label() for one in found]
        return {"question": "Ask the caller which of these is meant.", "places": meant}
    days, week = document(f"/forecast/data/forecast/{found[0].office}.json", list, deadline)
    ahead = get_args(Day).index(day)
    if day in get_args(Weekday):
        ahead = (get_args(Weekday).index(day) - at.weekday()) % 7
    return tell(found[0], at.date() + timedelta(days=ahead), at, days, week, places)


# ── The documents ───────────────────────────────────────────────────────────────────────────────

lock = threading.Lock()  # several calls may ask at once, each in a thread of its own
# path -> when it was asked for (time.monotonic()), what comes
documents: dict[str, tuple[float, Future[Any]]] = {}


def document(path: str, read: Callable[[Any], Any], deadline: float) -> Any:
    """What `read` makes of a document. All who want it at a time wait for the same request."""
    with lock:
        asked_at, coming = documents.get(path, (0.0, None))
        failed = coming is not None and coming.done() and coming.exception() is not None
        if coming is None or failed or time.monotonic() - asked_at > KEEP_S:
            coming = Future()
            # In a thread, which can be left behind, because name resolution has no time limit.
            threading.Thread(target=fetch, args=(path, read, coming), daemon=True).start()
            documents[path] = time.monotonic(), coming
    return coming.result(max(0.0, deadline - time.monotonic()))


def fetch(path: str, read: Callable[[Any], Any], coming: Future[Any]) -> None:
    try:
        body, deadline = b"", time.monotonic() + LIMIT_S
        with urllib.request.urlopen(URL + path, timeout=LIMIT_S) as response:
            while chunk := response.read1():
                body += chunk
                if time.monotonic() > deadline or len(body) > MAX_BYTES:
                    raise TimeoutError(f"{path} is too slow or too long")
        coming.set_result(read(json.loads(body)))
    except BaseException as error:
        coming.set_exception(error)


# ── Places ──────────────────────────────────────────────────────────────────────────────────────

# Offices whose forecast stands in another's document.
OTHER_DOCUMENT = {"014030": "014100", "460040": "460100"}
# The prefectures in kana, which the documents lack, in the order of their codes.
KANA = """ほっかいどう あおもり いわて みやぎ あきた やまがた ふくしま いばらき とちぎ ぐんま
さいたま ちば とうきょう かながわ にいがた とやま いしかわ ふくい やまなし ながの ぎふ しずおか
あいち みえ しが きょうと おおさか ひょうご なら わかやま とっとり しまね おかやま ひろしま
やまぐち とくしま かがわ えひめ こうち ふくおか さが ながさき くまもと おおいた みやざき
かごしま おきなわ"""
KIND = re.compile(
    "([都府県市区町村]|地方|けん|ふ|と|し|く|ちょう|まち|むら|そん"
    "|prefecture|city|ward|town|village|region|ken|fu|to|shi|ku|cho|machi|mura|son)$"
)
HIRAGANA: dict[int, int | str] = {code: code - 0x60 for code in range(ord("ァ"), ord("ヶ"))}
HIRAGANA[ord("ヶ")] = "け"


class Place(NamedTuple):
    name: str
    prefecture: str
    office: str  # whose document has its forecast
    area: str  # code of the first-level area (class10) it lies in
    # Of places of one name the lowest is meant: 0 capital, 1 prefecture, 2 市 and 区, 3 others.
    rank: int

    def label(self) -> str:
        return self.name if self.name == self.prefecture else f"{self.name}（{self.prefecture}）"


def fold(name: str) -> str:
    """A name as it is compared: Ōsaka is the same as OOSAKA and osaka, ヨコハマ as よこはま."""
    name = unicodedata.normalize("NFKD", name.casefold())
    name = re.sub("[\u0302\u0304]", "", name)  # the marks of ô and ō
    name = re.sub(r"[\W_]", "", unicodedata.normalize("NFC", name).translate(HIRAGANA))
    return re.sub("m(?=[bmp])", "n", re.sub("o([ou]|h(?![aeiouy]))", "o", name).replace("uu", "u"))


def bare(name: str) -> str:
    return re.sub(r"\s*[(（].*", "", name)  # 鹿児島県（奄美地方除く）


def read_places(areas: Any) -> dict[str, list[Place]]:
    """All places by their names, likeliest first; the document itself is too large to be kept."""
    places: dict[str, list[Place]] = {}
    offices = sorted(areas["offices"].items())
    prefectures = {code[:2]: bare(office["name"]) for code, office in offices}
    prefectures |= {"01": "北海道", "47": "沖縄県"}  # several offices, none of them of this name

    def add(area: str, rank: int, *names: str) -> None:
        office = areas["class10s"][area]["parent"]
        document = OTHER_DOCUMENT.get(office, office)
        place = Place(names[0], prefectures[office[:2]], document, area, rank)
        folded = [fold(name) for name in names]
        for key in {*folded, *(KIND.sub("", name) for name in folded)} - {""}:
            places.setdefault(key, []).append(place)

    for code, office in areas["offices"].items():
        name, prefecture = bare(office["name"]), prefectures[code[:2]]
        # The first area of a prefecture has its capital, but in 山口県.
        if prefecture in (name, "北海道", "沖縄県"):
            roman = {"01": "Hokkaido", "47": "Okinawa"}.get(code[:2], bare(office["enName"]))
            kana = KANA.split()[int(code[:2]) - 1]
            add(office["children"][0], 1, name, prefecture, roman, f"{roman} Prefecture", kana)
    for code, entry in areas["class10s"].items():
        add(code, 3, entry["name"], entry["enName"])
    for entry in areas["class15s"].values():
        add(entry["parent"], 3, entry["name"], entry["enName"])
    municipalities: dict[str, list[Any]] = {}
    for code, entry in areas["class20s"].items():
        municipalities.setdefault(code[:5], []).append(entry)
    # Most have one part; of 仙台市東部 and 仙台市西部 the first stands for 仙台市.
    for parts in municipalities.values():
        name, kana = (commonprefix([bare(part[key]) for part in parts]) for key in ("name", "kana"))
        # Eastern Sendai City; Konan, Koriyama City
        roman = re.sub("^(.*ern |.*, )", "", bare(parts[0]["enName"]))
        for part in parts:
            area = areas["class15s"][part["parent"]]["parent"]
            capital = name == prefectures[areas["class10s"][area]["parent"][:2]][:-1] + "市"
            if part is parts[0]:
                add(area, 0 if capital else 2 if name[-1] in "市区" else 3, name, kana, roman)
            elif bare(part["name"]) != name:
                add(area, 3, part["name"])
    return {key: sorted(same, key=lambda place: place.rank) for key, same in places.items()}


def find(asked: str, places: dict[str, list[Place]]) -> list[Place]:
    """The places that may be meant: none, one, or several whose forecasts differ."""
    whole = fold(asked[:100]).removesuffix("japan")
    names = [(whole, "")]  # with the prefecture it must lie in; empty: any
    for prefix, found in places.items():
        if found[0].rank <= 1:  # 広島県府中市, 広島の府中, Fuchu, Hiroshima
            rests = [whole.removeprefix(prefix), whole.removeprefix(prefix + "の")]
            rests.append(whole.removesuffix(prefix))
            names += [(rest, found[0].prefecture) for rest in rests if rest not in ("", whole)]
    names += [(KIND.sub("", name), prefecture) for name, prefecture in names]  # Osaka-fu
    for name, prefecture in list(names):  # 横浜市青葉区: the city
        ends = [end for end in range(len(name), 1, -1) if name[end - 1] in "市区町村"]
        names += [(name[:end], prefecture) for end in ends]
    for name, prefecture in names:
        same = [one for one in places.get(name, []) if prefecture in ("", one.prefecture)]
        if same := [one for one in same if one.rank == same[0].rank]:
            return list({one.area: one for one in reversed(same)}.values())[::-1]
    return []


# ── The forecast ────────────────────────────────────────────────────────────────────────────────

# What the week's codes mean. There are more, with times of day, but not for the week.
TELOPS = """100晴れ 101晴れ時々くもり 102晴れ一時雨 103晴れ時々雨 104晴れ一時雪 105晴れ時々雪
106晴れ一時雨か雪 107晴れ時々雨か雪 108晴れ一時雨か雷雨 110晴れのち時々くもり 111晴れのちくもり
112晴れのち一時雨 113晴れのち時々雨 114晴れのち雨 115晴れのち一時雪 116晴れのち時々雪
117晴れのち雪 118晴れのち雨か雪 119晴れのち雨か雷雨 140晴れ時々雨で雷を伴う 160晴れ一時雪か雨
170晴れ時々雪か雨 181晴れのち雪か雨 200くもり 201くもり時々晴れ 202くもり一時雨 203くもり時々雨
204くもり一時雪 205くもり時々雪 206くもり一時雨か雪 207くもり時々雨か雪 208くもり一時雨か雷雨
209霧 210くもりのち時々晴れ 211くもりのち晴れ 212くもりのち一時雨 213くもりのち時々雨
214くもりのち雨 215くもりのち一時雪 216くもりのち時々雪 217くもりのち雪 218くもりのち雨か雪
219くもりのち雨か雷雨 240くもり時々雨で雷を伴う 250くもり時々雪で雷を伴う 260くもり一時雪か雨
270くもり時々雪か雨 281くもりのち雪か雨 300雨 301雨時々晴れ 302雨時々やむ 303雨時々雪 304雨か雪
306大雨 308雨で暴風を伴う 309雨一時雪 311雨のち晴れ 313雨のちくもり 314雨のち時々雪 315雨のち雪
316雨か雪のち晴れ 317雨か雪のちくもり 340雪か雨 350雨で雷を伴う 361雪か雨のち晴れ
371雪か雨のちくもり 400雪 401雪時々晴れ 402雪時々やむ 403雪時々雨 405大雪 406風雪が強い
407暴風雪 409雪一時雨 411雪のち晴れ 413雪のちくもり 414雪のち雨 450雪で雷を伴う"""


def tell(
    place: Place, wanted: date, at: datetime, days: Any, week: Any, places: Any
) -> dict[str, Any] | str:
    """What the agency says of a day: in words in `days` (two or three), in codes in `week`."""
    areas = {entry["area"]["code"]: entry for entry in series(days, "weathers")}
    area, part = areas[place.area], days
    # The week joins some areas: 中部・南部, 沿岸, or the whole prefecture.
    own = [entry for entry in series(week, "weatherCodes") if entry["area"]["code"] == place.area]
    joint = [entry for entry in series(week, "weatherCodes") if entry["area"]["code"] not in areas]
    in_week = (own + joint)[0]

    weather = [words.replace("\u3000", " ") for _, words in on(wanted, area, "weathers")]
    if not weather:
        area, part, telops = in_week, week, {word[:3]: word[3:] for word in TELOPS.split()}
        weather = [telops[code] for _, code in on(wanted, area, "weatherCodes") if code in telops]
    issued = datetime.fromisoformat(part["reportDatetime"]).astimezone(JST)
    if at - issued > MAX_AGE:
        return f"{NO_FORECAST} The newest there is was issued on {spoken(issued)} and is too old."
    if not weather:
        return f"{NO_FORECAST} That of {spoken(issued)} does not tell of {spoken(wanted)}."

    [pops] = [entry for entry in series(days, "pops") if entry["area"]["code"] == place.area]
    still_to_come = at - timedelta(hours=6)
    periods = [
        (start, chance) for start, chance in on(wanted, pops, "pops") if start > still_to_come
    ]
    rain = {f"{start.hour}時から{start.hour + 6}時": f"{chance}%" for start, chance in periods}
    for _, chance in on(wanted, in_week, "pops") if not rain else []:
        rain["一日"] = f"{chance}%"
    clock = f"{issued.hour}時{issued.minute:02}分"
    others = [one["area"]["name"] for code, one in areas.items() if code != place.area]
    return {
        "place": place.label(),
        "area": area["area"]["name"],
        "other_areas": others if place.name == place.prefecture else [],
        "date": spoken(wanted),
        "weather": weather[0],
        "chance_of_rain": rain or None,
        "temperature": temperature(place, wanted, days, week, in_week, places),
        "issued": f"{part['publishingOffice']} {spoken(issued)}{clock}発表（日本時間）",
        "source": "気象庁 (Japan Meteorological Agency)。出典：気象庁ホームページ",
    }


def temperature(
    place: Place, wanted: date, days: Any, week: Any, in_week: Any, places: Any
) -> dict[str, Any] | None:
    """Stations do not say in which area they are: their name may tell it, or else their turn."""
    turn = [entry["area"]["code"] for entry in series(days, "weathers")].index(place.area)
    fitting = []
    for number, station in enumerate(series(days, "temps")):
        name = station["area"]["name"]
        same_name = places.get(fold(name), [])
        same_name = [one for one in same_name if one.prefecture == place.prefecture]
        if place.area in [one.area for one in same_name] or (number == turn and not same_name):
            fitting.append((place not in same_name, number != turn, number, station))
    for *_, station in sorted(fitting, key=lambda fit: fit[:3])[:1]:
        by_hour = {start.hour: int(degrees) for start, degrees in on(wanted, station, "temps")}
        if by_hour:  # 9 o'clock has the maximum, 0 o'clock the minimum, but not today's
            issued = datetime.fromisoformat(days["reportDatetime"]).astimezone(JST)
            minimum = by_hour.get(0) if wanted > issued.date() else None
            return degrees_at(station, minimum, by_hour.get(9))
    # The week has one station for each of its areas, in their order.
    codes = [entry["area"]["code"] for entry in series(week, "weatherCodes")]
    station = series(week, "tempsMin")[codes.index(in_week["area"]["code"])]
    lows, highs = on(wanted, station, "tempsMin"), on(wanted, station, "tempsMax")
    for (_, low), (_, high) in zip(lows, highs, strict=True):
        return degrees_at(station, int(low), int(high))
    return None


def degrees_at(station: Any, low: int | None, high: int | None) -> dict[str, Any]:
    name = station["area"]["name"]
    return {"station": name, "minimum_celsius": low, "maximum_celsius": high}


def series(part: Any, key: str) -> list[Any]:
    """The areas or stations that a document tells this of; each is given the times."""
    [found] = [one for one in part["timeSeries"] if key in one["areas"][0]]
    times = [datetime.fromisoformat(text).astimezone(JST) for text in found["timeDefines"]]
    return [entry | {"times": times} for entry in found["areas"]]


def on(wanted: date, entry: Any, key: str) -> list[tuple[datetime, str]]:
    """What is said of a day, with its times; an empty text says nothing."""
    told = zip(entry["times"], entry[key], strict=True)
    return [(start, text) for start, text in told if text and start.date() == wanted]


def spoken(day: date) -> str:
    return f"{day.month}月{day.day}日（{'月火水木金土日'[day.weekday()]}）"


TOOLS = [weather_forecast]
