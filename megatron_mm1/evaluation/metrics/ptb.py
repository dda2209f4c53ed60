"""Penn Treebank tokens of captions, as the published caption metrics count them.

COCO's evaluation code tokenizes with Stanford's PTBTokenizer 3.4.1 (Java) in lower case and leaves punctuation out.
Scores are comparable only on the same tokens, so these are the same, without Java. Like that lexer, this takes the
longest match of all rules at each place, of equally long ones the first rule's; what a rule looks ahead at counts.
"""

import re
from collections.abc import Iterator

_LEFT_OUT = re.compile(r"[\"'`.,:;?!]|-+|\.\.\.|&(?:quot|apos|nbsp);")
"""Tokens that COCO's code drops; not brackets, which its list has in capitals while the tokens are in lower case."""

_SPELLINGS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "€": "$", "¢": "cents", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "\u2019": "'"},
}
_RESPELLED = re.compile("|".join(map(re.escape, _SPELLINGS)))

_ABBREVIATIONS = """
adj adm adv al ala alex apr assn assoc asst attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie cmdr co col
colo comdr conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind
insp intl jan jos jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt
mtg neb nev nov oct okla penn pfc ph plc pres prof profs pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt
spc sq sr st ste supt supts sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo
"""
_CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
"""Abbreviations that are words in lower case."""
_NUMBERED = "art ca fig figs no nos op pp prop"
"""Abbreviations before a number only."""
_SENTENCE_STARTS = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other
Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""
"""Before these, "plan B." is a word and a stop. So it is at the end: there the Java code looks at the next caption."""

_LETTER, _ALNUM, _QUOTE = r"[^\W\d_]", r"[^\W_]", r"['\u2019]"
_LETTERS = rf"{_LETTER}(?:\w*{_ALNUM})?"
_WORD = rf"{_LETTERS}(?:[.!?]{_LETTERS})*"
_PART = rf"(?:[dDoOlL]{_QUOTE}(?={_LETTER}))?{_ALNUM}+"
_HYPHENATED = rf"{_PART}(?:-{_PART})*"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_NUMBER = r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"
_ENDING = rf"{_QUOTE}(?i:[sdm]|re|ve|ll)(?!{_LETTER})"
_NOT = r"(?i:n['\u2019`]t)(?!\w)"


def _any(words: str) -> str:
    return "|".join(words.split())


_RULES = tuple(
    # Of a pattern with groups, the one that matched is the token; the rest is only looked at.
    re.compile(pattern)
    for pattern in (
        r"</?[A-Za-z!?][^<>]*>",
        r"&(?:amp|lt|gt|quot|apos|nbsp);|&#\d+;",
        r"(?:https?://|www\.)[^\s\"<>|()]*[^\s\"<>|().,;:!?'-]",
        rf"[\w.+-]+@{_ALNUM}+(?:[.-]\w+)*",
        r"((?i:can))not(?!\w)|((?i:gon))na(?!\w)|((?i:wan))na(?!\w)|((?i:got))ta(?!\w)|((?i:lem|gim))me(?!\w)",
        rf"({_QUOTE}[tT])(?i:is|was)(?!\w)|([yY]{_QUOTE}){_LETTER}+",
        rf"([A-Za-z]+){_NOT}",
        _NOT,
        rf"({_WORD}|{_HYPHENATED}|{_NUMBER}){_ENDING}",
        _ENDING,
        rf"[oO]{_QUOTE}clock|[mM]a{_QUOTE}am|{_QUOTE}[nN]{_QUOTE}|{_QUOTE}(?:[nN]|em|til|cause|\d\ds)(?!\w)",
        _WORD,
        _HYPHENATED,
        _SLASHED,
        r"(?:\d{1,4}-)?\d{1,4}/\d{1,4}|\d{1,2}/\d{1,2}/\d{2,4}",
        _NUMBER,
        rf"\d+(?:[.,]\d+)+(?:-{_ALNUM}+)+|(?:[A-Z]\.)+-{_ALNUM}+",
        r"[A-Z]+(?:[+&][A-Z]+)+|[cC]\+\+|[cC]#|[#@][A-Za-z]\w*",
        rf"[A-Za-z](?:\.[A-Za-z])+\.(?!\w)|[A-Za-z]\.(?!\w|\s*$|\s+(?:{_any(_SENTENCE_STARTS)})\s)",
        rf"(?:(?i:{_any(_ABBREVIATIONS)}|ph\.d)|{_any(_CAPITALIZED)})\.(?!{_LETTER})|(?i:{_any(_NUMBERED)})\.(?=\s*\d)",
        r"\(\d{3}\)[ -]?\d{3}-\d{4}",
        r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]|\^_\^",
        r"[?!]+|\.{3}|--+|\*+|<<|>>|US\$",
        r"\S",
    )
)
_PLAIN = re.compile(r"[a-z]+(?![^ ])")
"""Letters up to a space: a word, but for `_DIVIDED`."""
_DIVIDED = frozenset(("cannot", "gonna", "wanna", "gotta", "lemme", "gimme"))
_SAME_AS_ASCII = str.maketrans(
    {
        **{"\u201c": '"', "\u201d": '"', "\u2018": "'", "\xa0": " ", "\u2026": " . "},
        **{"\u2013": " - ", "\u2014": " - ", "\u2015": " - "},
    }
)


def tokenize(caption: str) -> list[str]:
    """Tokens of a caption, in lower case and without punctuation; of the empty one, none."""
    tokens = (_RESPELLED.sub(lambda found: _SPELLINGS[found[0]], token).lower() for token in _lexed(caption))
    return [part for token in tokens if not _LEFT_OUT.fullmatch(token) for part in token.split()]


def _lexed(text: str) -> Iterator[str]:
    text = text.translate(_SAME_AS_ASCII)
    start = 0
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        plain = _PLAIN.match(text, start)
        if plain and plain[0] not in _DIVIDED:
            token = plain[0]
        else:
            matches = [found for rule in _RULES if (found := rule.match(text, start))]
            longest = max(matches, key=lambda found: found.end())  # the first of equals
            token = longest[longest.lastindex or 0]
        yield token
        start += len(token)
