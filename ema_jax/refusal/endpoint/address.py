"""Address and key of an endpoint, checked before anything is sent."""

import ipaddress
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass

import httpx

from ema_jax.errors import UserError

DEFAULT_KEY = "OPENAI_API_KEY"

_LONGEST_HOST = 253  # of the domain name system

_ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_KEY = re.compile(r"[!-~]+")
_API_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Address:
    """The URL of chat completions.

    Attributes:
        url: with Azure's `api-version` if it was given.
        plain: True without encryption.
        local: True on this machine.
    """

    url: str
    plain: bool
    local: bool

    @classmethod
    def checked(cls, url: str, api_version: str | None, allow_http_host: str | None) -> "Address":
        """Reads a base such as `https://HOST/v1`.

        Raises:
            UserError: malformed, with a login or a query, or without encryption to another machine
                that is not the private one allowed.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host = parts.hostname or ""
            read = httpx.URL(url)
            # The host that is checked is the host that is reached.
            if read.host != host or parts.port == 0 or len(read.raw_host) > _LONGEST_HOST:
                raise ValueError
            read.raw_host.decode("ascii").encode("idna")  # as a socket does, which refuses a..b
        except (ValueError, httpx.InvalidURL):
            raise UserError("judge 'endpoint': url is malformed; give https://HOST/v1") from None
        login = parts.username is not None or parts.password is not None
        if login or parts.query or parts.fragment:
            raise UserError(
                "judge 'endpoint': url carries a login, a query or a fragment; give "
                "https://HOST/v1, put the key into the environment, and give Azure's api-version "
                "as api_version"
            )
        if api_version is not None and not _API_VERSION.fullmatch(api_version):
            raise UserError(
                "judge 'endpoint': api_version is no version; give one such as 2024-10-21"
            )
        plain, local = parts.scheme == "http", _is_loopback(host)
        if not host or not (parts.scheme == "https" or (plain and (local or allow_http_host))):
            raise UserError(
                f"judge 'endpoint': {url}: give an https:// address (plain http only on this "
                "machine, or to the private host that allow_http_host names)"
            )
        if plain and not local:
            _check_private(host, allow_http_host)
        path = parts.path.rstrip("/")
        path += "" if path.endswith("/chat/completions") else "/chat/completions"
        query = urllib.parse.urlencode({"api-version": api_version}) if api_version else ""
        return cls(
            urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, "")), plain, local
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_private(host: str, allowed: str | None) -> None:
    if host != (allowed or "").strip("[]").lower():
        raise UserError(
            f"judge 'endpoint': plain http to {host}, and allow_http_host names another host; "
            "give the host of url, without a port"
        )
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return  # not resolved: nothing can be sent to it either
    if any(ipaddress.ip_address(address).is_global for address in found):
        raise UserError(
            f"judge 'endpoint': {host} is a public address; give an https:// address (plain http "
            "is for private networks)"
        )


def read_key(key_env: str | None, address: Address) -> tuple[str, str]:
    """The key and the name of its environment variable; both are `""` where none is to be sent.

    Over plain http to another machine a key is sent only if its variable was named: the usual one
    holds a key for another service.

    Raises:
        UserError: a malformed name of a variable, a missing key where one is needed, or a key with
            characters that no key has.
    """
    if key_env is None:
        if address.plain and not address.local:
            return "", ""
        key_env = DEFAULT_KEY
    # The key itself may be given here by mistake; it must not reach a log.
    if not _ENVIRONMENT_NAME.fullmatch(key_env):
        raise UserError(
            "judge 'endpoint': key_env is not the name of an environment variable (capital "
            "letters, digits, _); put the key into one and give its name"
        )
    key = os.environ.get(key_env, "").strip()
    if not key and not address.plain:
        raise UserError(f"judge 'endpoint': {key_env} is not set; put the endpoint's key into it")
    if key and not _KEY.fullmatch(key):
        raise UserError(
            f"judge 'endpoint': {key_env} holds characters that no key has; set it again"
        )
    return key, key_env
