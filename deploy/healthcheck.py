"""Ask the server of this container whether it is ready: exit status 0, or 1 and why.

Its port, address and TLS are read from its command line, which is process 1's (or that of the number given)."""
import argparse
import ssl
import sys
import urllib.request
from pathlib import Path


def target(words: list[str]) -> str:
    "Return the URL of `/readyz` of a server that was started with these options of `mmembed serve`."
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument('--port', default='8000')
    options.add_argument('--host', default='127.0.0.1')
    options.add_argument('--tls-cert', '--tls_cert')
    given, _ = options.parse_known_args([w for w in words if w != '--'])
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(given.host, given.host)
    return f"http{'s' if given.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{given.port}/readyz"


def main(pid: str = '1') -> int:
    url = target(Path(f'/proc/{pid}/cmdline').read_text().split('\0'))
    trust = ssl.create_default_context()
    # it asks its own container, where the certificate's name is another
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try: opener.open(url, timeout=5)
    except OSError as e:
        print(f'{url}: {e}')
        return 1
    return 0


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
