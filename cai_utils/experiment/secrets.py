"""Keys, passwords and tokens: refused in parameters, hidden in messages.

Parameters go into executed notebooks, provenance, stamps and W&B; a message goes into failed
notebooks and logs. A key belongs in an environment variable, which none of these record.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

_SHORTEST = 6  # characters; "EMPTY" and the like, which servers without a key are given, are none

# user:password@ in an address, also where the password holds one of the marks / ? # that it should
# not: then what looks like the port is no number.
_USER = re.compile(r"(\bserver:(?!\w+://)|://)"
                   r"(?:[^/?#\s]*|(?!\[)[^/?#\s:]*:(?!\d*(?:[/?#\s]|$))\S*)@")
_QUERY = re.compile(r"(\bserver:[^#?\s]*\?)[^#\s]*")  # a model server's address has none
_NAME = (r"[\w.-]*(?:api[_-]?key|key|key[_-]?id|token|secret|password|passwd|passphrase|pwd|"
         r"pass|auth|authorization|bearer|signature|sig|credentials?)")
_PAIR = re.compile(rf"(?i)([?&;#]{_NAME}=)[^&;#\s'\"]+")
_KEY_OF_DICT = re.compile(r"(?i)(?:.*[_.-])?(?:api_?key|token|secret|password|passwd|"
                          r"authorization|credentials?)")
_SHAPE = re.compile(
    r"\b(?:sk-(?=[\w-]*\d)[\w-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abp]-[\w-]{10,})"
    r"|(?<=Bearer )[\w.~+/-]{16,}=*")
_VARIABLE = re.compile(r"(?i)(?:API_?KEY|_KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")


def check(value, name="", where=""):
    """ValueError where a parameter's value, at any depth, holds a user or password in an address, a
    key or token in its query or among the options of a spec, the value of an environment variable
    that holds a secret, or what has the form of a provider's key. The message does not repeat it.

    name: the parameter's, in the message; where: what begins the message (a file).
    """
    if isinstance(value, dict):
        for key, part in value.items():
            place = f"{name}.{key}" if name else str(key)
            check(str(key), "a name", where)
            if isinstance(part, str) and part and _KEY_OF_DICT.fullmatch(str(key)):
                raise _refused(place, where)
            check(part, place, where)
    elif isinstance(value, list | tuple | set):
        for i, part in enumerate(value):
            check(part, f"{name}[{i}]", where)
    elif isinstance(value, str | Path) and held(str(value)):
        raise _refused(name, where)


def held(text):
    """Whether a parameter's text holds a secret, as `check` describes."""
    address = text.startswith("server:") or "://" in text
    return bool(
        address and (_USER.search(text) or _PAIR.search(text) or _QUERY.search(text))
        or _SHAPE.search(text) or any(secret in text for secret in _secrets())
    )


def _refused(name, where):
    return ValueError(
        f"{where}{hidden(name)} holds a key, password or token (in an address: user:password@ or "
        "?...), and parameters go into notebooks and records: take it out, and put the key into an "
        "environment variable, CAI_API_KEY for a model server"
    )


def hidden(text):
    """The text with all secrets replaced by ***: values of environment variables that are named as
    one (`..._API_KEY`, `HF_TOKEN`), users and passwords in addresses and in the proxy variables,
    values of keys and tokens in queries, and what has the form of a provider's key."""
    text = str(text)
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))
    return _SHAPE.sub("***", _PAIR.sub(r"\1***", text))


def _secrets():
    """Secrets of the environment in the forms in which they are quoted, the longest first."""
    found = set()
    for name, value in os.environ.items():
        if _VARIABLE.search(name):
            found.add(value.strip())
        elif name.lower().endswith("_proxy") and "@" in value:
            user = re.sub(r"^\w+://", "", value).rpartition("@")[0]
            found |= {user, user.partition(":")[2]}
    found |= {form(value) for value in found for form in (quote, unquote, _quote_all, _escaped)}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def _quote_all(value):
    return quote(value, safe="")


def _escaped(value):
    return json.dumps(value)[1:-1]


def host(address):
    """scheme://host:port of an address, without anything that could be a secret."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "another address"
    return f"{parts.scheme}://{parts.hostname}{port}" if parts.hostname else "another address"
