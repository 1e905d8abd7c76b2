"""A Hugging Face Hub on the loopback interface, with the part of its HTTP protocol that publishing and loading need.

It answers as the Hub does. Regular files are compared by git's hash. Binary files go through LFS, and requests for them
are redirected to another host, as the Hub redirects to its CDN: the API is at 127.0.0.1, LFS at 'localhost'. Tests can
order faults.
"""
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_test_token_that_nobody_else_may_see'
LFS_SUFFIXES = ('.safetensors', '.png', '.bin', '.pth')


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass
class Fault:
    """A fault of the next `times` requests that match.

    Attributes:
        request: Regular expression for 'METHOD /path'.
        times: Number of requests.
        status: Answer with this status.
        headers: Headers of that answer.
        cut: Close the connection after this number of bytes of the body: received if the request has one, else sent.
        spoil: Send wrong bytes of the same length.
        after: Execute the request, then close the connection without an answer.
    """
    request: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    spoil: bool = False
    after: bool = False


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # commits by branch

    def commit(self, files: dict[str, bytes], title: str, branch: str) -> str:
        sha = hashlib.sha1(f'{title}{len(self.commits)}{sorted(files)}'.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.refs[branch] = files, title, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class _Cut(Exception):
    pass


class HubServer:
    """A context manager. Tests may read and change its attributes."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, int, int]] = []  # 'METHOD /path', status, bytes received
        self.authorized: dict[str, bool] = {}  # whether the token came, by request
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self._http.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = 'main') -> str:
        """Add a commit without the client. Returns its hash."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.refs.setdefault('main', repo.commit({}, 'initial commit', 'main') if not repo.refs else repo.refs['main'])
        return repo.commit(files, 'added', branch)

    def fail(self, request: str, **kwargs: Any) -> None:
        self.faults.append(Fault(request, **kwargs))

    def take_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None

    def count(self, pattern: str) -> int:
        """Number of requests that match."""
        return sum(bool(re.search(pattern, request)) for request, *_ in self.log)

    def uploaded(self) -> int:
        """Bytes of file contents received: through LFS, and inside commits."""
        return sum(size for request, _, size in self.log if re.match('PUT|POST .*/commit/', request))

    def environment(self, home: Any) -> dict[str, str]:
        """Environment variables of a client. They must be set before huggingface_hub is imported."""
        import os
        env = {k: v for k, v in os.environ.items() if not k.upper().endswith('_PROXY') and not k.startswith('HF_')}
        return {**env, 'HF_ENDPOINT': self.url, 'HF_HUB_DISABLE_XET': '1', 'HF_HOME': str(home),
                'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'NO_PROXY': '127.0.0.1,localhost'}


def _route(method: str, pattern: str) -> Callable[[Any], Any]:
    def mark(fn: Any) -> Any:
        fn.route = (method, re.compile(pattern))
        return fn
    return mark


_ID = r'(?P<repo_id>[\w.-]+/[\w.-]+)'


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (_Cut, ConnectionError):
            self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.request_name = f'{self.command} {path}'
        self.fault = self.hub.take_fault(self.request_name)
        self.received = 0
        self.authorized = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        self.hub.authorized[self.request_name] = 'Authorization' in self.headers
        try:
            body = self._receive()
            if self.fault is not None and self.fault.status:
                self._send(self.fault.status, {'error': 'ordered by the test'}, self.fault.headers)
                return
            if 'Authorization' in self.headers and not self.authorized:
                self._send(401, {'error': 'Invalid credentials in Authorization header'},
                           {'X-Error-Message': 'Invalid credentials in Authorization header'})
                return
            for route in _ROUTES:
                method, pattern = route.route
                match = pattern.fullmatch(path)
                if match and method in (self.command, 'GET' if self.command == 'HEAD' else ''):
                    route(self, body, **match.groupdict())
                    return
            self._send(404, {'error': f'no such page: {self.request_name}'})
        except _Cut:
            self.hub.log.append((self.request_name, 0, self.received))
            raise

    do_HEAD = do_POST = do_PUT = do_GET

    def _receive(self) -> bytes:
        size = int(self.headers.get('Content-Length') or 0)
        cut = self.fault.cut if self.fault is not None and size else None
        parts = []
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while chunk := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(chunk))
                self.rfile.readline()
                self.received += chunk
                if self.fault is not None and self.fault.cut is not None and self.received >= self.fault.cut:
                    raise _Cut
            self.rfile.readline()
            return b''.join(parts)
        parts = [self.rfile.read(size if cut is None else min(cut, size))]
        self.received = len(parts[0])
        if cut is not None:
            raise _Cut
        return parts[0]

    def _send(self, status: int, content: Any = b'', headers: dict[str, str] | None = None) -> None:
        fault = self.fault
        if fault is not None and fault.after:
            raise _Cut
        self.hub.log.append((self.request_name, status, self.received))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header('Content-Type', 'application/json')
        for key, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault is not None and fault.spoil:
            data = bytes(b ^ 1 for b in data)
        if fault is not None and fault.cut is not None:
            self.wfile.write(data[:fault.cut])
            self.wfile.flush()
            time.sleep(0.05)
            raise _Cut
        self.wfile.write(data)

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message, **(headers or {})})

    def _repo(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository if the request may read or write it. Otherwise answers with the Hub's error."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or ((repo.private or write) and not self.authorized):
            if self.authorized:
                self._error(404, 'RepoNotFound', 'Repository not found')
            else:
                self._send(401, {'error': 'Invalid username or password.'})
            return None
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = repo.find(revision)
        if sha is None:
            self._error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
            return None
        return sha, repo.commits[sha]

    @_route('GET', '/api/whoami-v2')
    def whoami(self, body: bytes) -> None:
        if self.authorized:
            self._send(200, {'type': 'user', 'name': 'tester', 'orgs': []})
        else:
            self._send(401, {'error': 'Invalid username or password.'})

    @_route('POST', '/api/repos/create')
    def create(self, body: bytes) -> None:
        if not self.authorized:
            self._send(401, {'error': 'Invalid username or password.'})
            return
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.repos:
            self._send(409, {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{repo_id}'})
            return
        private = asked.get('visibility') == 'private' or bool(asked.get('private'))
        repo = self.hub.repos[repo_id] = Repo(private=private)
        repo.commit({'.gitattributes': b'*.safetensors filter=lfs\n'}, 'initial commit', 'main')
        self._send(200, {'url': f'{self.hub.url}/{repo_id}'})

    @_route('POST', '/api/validate-yaml')
    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)['content']
        if content.startswith('---\n') and '\n---' in content[4:]:
            self._send(200, {'errors': [], 'warnings': []})
        else:
            self._send(400, {'errors': [{'message': 'no metadata'}], 'warnings': []})

    @_route('POST', rf'/api/models/{_ID}/branch/(?P<branch>.+)')
    def branch(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return
        if branch in repo.refs:
            self._send(409, {'error': 'Reference already exists'})
            return
        repo.refs[branch] = repo.refs['main']
        self._send(200, {})

    @_route('GET', rf'/api/models/{_ID}(/revision/(?P<revision>.+))?')
    def info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        found = repo and self._files(repo, revision or 'main')
        if repo and found:
            sha, files = found
            siblings = [{'rfilename': name, 'size': len(content), 'blobId': git_sha(content), **(
                {'lfs': {'sha256': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 134}}
                if name.endswith(LFS_SUFFIXES) else {})} for name, content in files.items()]
            self._send(200, {'id': repo_id, 'modelId': repo_id, 'sha': sha, 'private': repo.private, 'tags': [],
                             'siblings': siblings})

    @_route('GET', rf'/api/models/{_ID}/tree/(?P<revision>[^/]+)')
    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        found = repo and self._files(repo, revision)
        if found:
            self._send(200, [
                {'type': 'file', 'path': name, 'size': len(content), 'oid': git_sha(content), **(
                    {'lfs': {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 134}}
                    if name.endswith(LFS_SUFFIXES) else {})} for name, content in found[1].items()])

    @_route('POST', rf'/api/models/{_ID}/preupload/(?P<revision>.+)')
    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        found = repo and self._files(repo, revision)
        if found:
            def answer(path: str) -> dict[str, Any]:
                lfs, there = path.endswith(LFS_SUFFIXES), found[1].get(path)
                oid = there and (hashlib.sha256(there).hexdigest() if lfs else git_sha(there))
                return {'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False,
                        **({'oid': oid} if oid else {})}

            self._send(200, {'files': [answer(f['path']) for f in json.loads(body)['files']]})

    @_route('POST', rf'/{_ID}\.git/info/lfs/objects/batch')
    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if self._repo(repo_id, write=True) is not None:
            objects = json.loads(body)['objects']
            cdn = f'http://localhost:{self.hub.port}/lfs'
            self._send(200, {'transfer': 'basic', 'objects': [
                {**o, **({} if o['oid'] in self.hub.lfs else {'actions': {
                    'upload': {'href': f"{cdn}/{o['oid']}"},
                    'verify': {'href': f"{self.hub.url}/{repo_id}/lfs/verify"}}})} for o in objects]})

    @_route('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})')
    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {'error': 'the content has another hash'})
            return
        self.hub.lfs[oid] = body
        self._send(200)

    @_route('POST', rf'/{_ID}/lfs/verify')
    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        asked = json.loads(body)
        there = self.hub.lfs.get(asked['oid'])
        self._send(200 if there is not None and len(there) == asked['size'] else 404, {})

    @_route('POST', rf'/api/models/{_ID}/commit/(?P<revision>.+)')
    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        found = repo and self._files(repo, revision)
        if not repo or not found:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]['value'], dict(found[1])
        if header.get('parentCommit', found[0]) != found[0]:
            self._send(412, {'error': 'A commit has happened since. Please refresh and try again.'})
            return
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile' and value['oid'] in self.hub.lfs:
                files[value['path']] = self.hub.lfs[value['oid']]
            else:
                self._send(400, {'error': f"cannot do {line['key']} {value['path']}"})
                return
        sha = repo.commit(files, header['summary'], revision)
        self._send(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{sha}',
                         'hookOutput': ''})

    @_route('GET', rf'/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)')
    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        found = repo and self._files(repo, revision)
        if not found:
            return
        sha, files = found
        if name not in files:
            self._error(404, 'EntryNotFound', 'Entry not found', {'X-Repo-Commit': sha})
            return
        content = files[name]
        if name.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            self.hub.lfs.setdefault(oid, content)
            self._send(302, b'', {
                'X-Repo-Commit': sha, 'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': str(len(content)),
                'Location': f'http://localhost:{self.hub.port}/lfs/{oid}'})
        else:
            self._send(200, content, {'X-Repo-Commit': sha, 'ETag': f'"{git_sha(content)}"'})

    @_route('GET', r'/lfs/(?P<oid>[0-9a-f]{64})')
    def lfs_get(self, body: bytes, oid: str) -> None:
        content = self.hub.lfs[oid]
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        headers = {'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'}
        if asked:
            start = int(asked[1])
            self._send(206, content[start:], {
                **headers, 'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'})
        else:
            self._send(200, content, headers)


_ROUTES = [fn for fn in vars(_Handler).values() if hasattr(fn, 'route')]
