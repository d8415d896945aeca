"""What settings mean: credentials, and how rounds go."""

import os

from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials, ensure_token
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_coordinator.settings import Settings
from quorate_protocol.credentials import find_token
from quorate_protocol.transport import ServerTls


def find_credentials(settings: Settings) -> tuple[ServerTls, str, DevelopmentCredentials | None]:
    """Certificate, token, and the development files where the certificate is one of those.

    Raises:
        ConfigurationError: a file cannot be read or made.
    """
    token_file = settings.auth.token_file
    from_environment = token_file is None and any(
        os.environ.get(name) for name in ("QUORATE_TOKEN", "QUORATE_TOKEN_FILE")
    )
    certificate_file, key_file = settings.tls.certificate_file, settings.tls.key_file
    if certificate_file is not None and key_file is not None:
        tls, development = ServerTls(certificate_file, key_file), None
        if token_file is None and not from_environment:
            token_file = ensure_token(settings.state_dir)
    else:
        development = ensure_development_credentials(settings.state_dir, names=settings.tls.names)
        tls = development.tls
        if not from_environment:
            token_file = token_file or development.token_file
    return tls, find_token(token_file), development


def round_policy(settings: Settings) -> RoundPolicy:
    """How rounds go of which their operators say nothing."""
    rounds = settings.rounds
    is_count = isinstance(rounds.quorum, int)
    return RoundPolicy(
        deadline_s=rounds.deadline_s,
        grace_s=min(rounds.grace_s, rounds.deadline_s),
        quorum=int(rounds.quorum) if is_count else None,
        quorum_fraction=None if is_count else float(rounds.quorum),
        attempts=rounds.attempts,
    )
