"""Rows of a hospital's years, made inside PostgreSQL through the real schema: what the proof of scale measures on.

One analysis per study, three instances, one result, one delivery, ten events; one in a hundred does not end well, the
newest are still on their way. Values are as the product writes them; only pixels, files and texts of length are absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service import chain

FIRST = "timestamptz '2023-11-25 00:00:00+00'"
YEARS_S = 3 * 365 * 86400
OPEN = 40  # the newest studies are not finished
UID = "'1.2.826.0.1.3680043.10.1451.7.'"
SOP_CT, SOP_SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.34"

PRUNING = {
    "method": "guarded",
    "slab_mm": 4.0,
    "tau": 0.9,
    "token_budget": 0.3,
    "slice_stage": True,
    "token_stage": True,
}
MODEL = {
    "name": "medgemma",
    "architecture": "Gemma3ForConditionalGeneration",
    "path": "/models/medgemma",
    "weights_sha256": "a" * 64,
    "transformers_version": "5.23.0",
    "torch_version": "2.13.0",
    "dtype": "bfloat16",
    "device": "cuda:0",
    "attention": "sdpa",
}
PER_INPUT = [[3, 70 + n % 9, 20] for n in range(85)]
SETTINGS = {"model": {"path": "/models/medgemma"}, "pruning": PRUNING, "series": {"min_slices": 8, "max_slices": 85}}

_AT = f"({FIRST} + (n::float8 / :studies) * interval '{YEARS_S} seconds')"
_STATE = (
    f"CASE WHEN n > :studies - {OPEN // 4} THEN 'queued' WHEN n > :studies - {OPEN // 3} THEN 'running' "
    f"WHEN n > :studies - {OPEN // 2} THEN 'read' WHEN n % 200 = 7 THEN 'refused' WHEN n % 500 = 8 THEN 'failed' "
    "ELSE 'done' END"
)
_HAS_RESULT = f"n <= :studies - {OPEN // 2} AND n % 200 <> 7 AND n % 500 <> 8"

STATEMENTS: dict[str, str] = {
    "study": f"""
        INSERT INTO study (id, study_uid, state, revision, dispatched_revision, first_received_at, opened_at,
            last_image_at, completed_at, calling_ae, held, patient_mismatch, instances, size_bytes)
        SELECT n, {UID} || n, CASE WHEN n > :studies - 5 THEN 'receiving' ELSE 'complete' END, 1, 1, {_AT}, {_AT},
            {_AT} + interval '40 s', {_AT} + interval '100 s', 'CT' || lpad((n % 12)::text, 2, '0'), n % 50000 = 3, false, 3, 3 * 525312
        FROM generate_series(1, :studies) n""",
    "study_header": f"""
        INSERT INTO study_header (study_id, salt, patient_id, issuer_of_patient_id, patient_name, patient_birth_date,
            patient_sex, accession_number, study_date, study_description)
        SELECT n, md5(n::text), 'PID' || lpad((n % (:studies * 4 / 10))::text, 8, '0'), 'HOSP',
            upper(md5((n % 7919)::text)) || '^' || upper(substr(md5((n % 911)::text), 1, 6)),
            to_char(date '1930-01-01' + (n % 30000)::int, 'YYYYMMDD'), CASE WHEN n % 2 = 0 THEN 'F' ELSE 'M' END,
            'A' || lpad(n::text, 10, '0'), to_char({_AT}, 'YYYYMMDD'), 'CT Thorax'
        FROM generate_series(1, :studies) n""",
    "instance": f"""
        INSERT INTO instance (study_id, series_uid, sop_instance_uid, sop_class_uid, transfer_syntax_uid, modality, sha256,
            size_bytes, path, received_at, revision, is_image, is_conflicting, calling_ae, called_ae, peer_address)
        SELECT n, {UID} || n || '.' || i % 2, {UID} || n || '.1.' || i, '{SOP_CT}', '1.2.840.10008.1.2.1', 'CT',
            md5(n::text || i) || md5(i::text || n), 525312, 'studies/' || md5(n::text) || '/' || i || '.dcm', {_AT}, 1,
            true, false, 'CT' || lpad((n % 12)::text, 2, '0'), 'MEDPRUNER', '192.0.2.' || n % 12
        FROM generate_series(1, :studies) n, generate_series(1, 3) i""",
    "analysis": f"""
        INSERT INTO analysis (id, study_id, revision, route, run_number, state, reason_code, reason, queued_at, rung_at,
            started_at, finished_at, attempts, fence, lease_until, worker, settings, pruning, model, prompt, series_uid,
            series_reason, flags, counts, per_input, timings_s, memory_peak_bytes, software_version, output_path,
            output_sha256)
        SELECT n, n, 1, CASE WHEN n % 5 = 0 THEN 'head' ELSE 'chest' END, 1, state,
            CASE state WHEN 'refused' THEN 'no-suitable-series' WHEN 'failed' THEN 'time-limit' END,
            CASE state WHEN 'refused' THEN 'no axial series of 8 slices or more' WHEN 'failed' THEN 'took too long' END,
            at + interval '101 s', at + interval '101 s', CASE WHEN state <> 'queued' THEN at + interval '110 s' END,
            CASE WHEN state NOT IN ('queued', 'running') THEN at + (110 + n % 40) * interval '1 s' END,
            CASE WHEN state = 'queued' THEN 0 ELSE 1 END, 1,
            CASE WHEN state = 'running' THEN at + interval '20 s' END, 'gpu1/1234', CAST(:settings AS jsonb),
            CAST(:pruning AS jsonb), CAST(:model AS jsonb), 'Read the slices.', {UID} || n || '.1', 'the only axial one',
            '[]', jsonb_build_object('slices_in_series', 255, 'slices_readable', 255, 'slices_sampled', 255,
                'inputs', 85, 'inputs_kept', 60 + n % 20, 'tokens_in', 21760, 'tokens_kept', 5000 + n % 2000,
                'tokens_merged', 900, 'tokens_text', 90, 'tokens_generated', 180),
            CAST(:per_input AS jsonb), jsonb_build_object('headers', 0.4, 'volume', 2.1 + (n % 10) / 10.0, 'preprocess', 1.1,
                'regions', 0.6, 'encode', 4.5, 'prune', 0.3, 'generate', 9.0 + (n % 50) / 10.0),
            12000000000 + n % 1000, '0.1.0', 'outputs/' || n || '/1.json', md5(n::text) || md5('o' || n)
        FROM (SELECT n, {_STATE} AS state, {_AT} AS at FROM generate_series(1, :studies) n) made""",
    "acquisition": f"""
        INSERT INTO acquisition (analysis_id, at, scanner, protocol, method, inputs, inputs_kept, tokens_in, tokens_kept)
        SELECT n, {_AT} + interval '130 s', 'Scanner ' || n % 12, 'Protocol ' || n % 40, 'guarded', 85, 60 + n % 20, 21760,
            5000 + n % 2000
        FROM generate_series(1, :studies) n WHERE {_HAS_RESULT}""",
    "report_text": f"""
        INSERT INTO report_text (analysis_id, findings, impression, raw_text)
        SELECT n, repeat('The lungs are clear. ', 20), 'No acute finding.', repeat('The lungs are clear. ', 21)
        FROM generate_series(1, :studies) n WHERE {_HAS_RESULT}""",
    "result": f"""
        INSERT INTO result (id, analysis_id, kind, state, sop_class_uid, sop_instance_uid, series_uid, device_uid, path,
            sha256, size_bytes, created_at, gate)
        SELECT n, n, 'sr-comprehensive3d', CASE WHEN n % 100000 = 9 THEN 'quarantined' ELSE 'built' END, '{SOP_SR}',
            {UID} || n || '.9901.1', {UID} || n || '.9901', {UID} || '1', 'outbox/' || n || '.dcm',
            md5('r' || n) || md5(n::text), 60000, {_AT} + interval '150 s', '[]'
        FROM generate_series(1, :studies) n WHERE {_HAS_RESULT}""",
    "delivery": f"""
        INSERT INTO delivery (result_id, destination, state, attempts, next_attempt_at, status, reason, created_at,
            delivered_at)
        SELECT n, CASE WHEN n % 5 = 0 THEN 'archive' ELSE 'pacs' END,
            CASE WHEN n > :studies - 200 THEN 'pending' WHEN n % 3000 = 11 THEN 'rejected' ELSE 'delivered' END, 1,
            CASE WHEN n > :studies - 200 THEN {_AT} + interval '200 s' END, 0, NULL, {_AT} + interval '150 s',
            CASE WHEN n <= :studies - 200 AND n % 3000 <> 11 THEN {_AT} + interval '155 s' END
        FROM generate_series(1, :studies) n WHERE {_HAS_RESULT}""",
    "audit_event": f"""
        INSERT INTO audit_event (id, at, kind, actor, study_id, analysis_id, result_id, delivery_id, detail, vouches_sha256)
        SELECT (n - 1) * :each + e, {_AT} + (e * 15) * interval '1 s', kind, actor, n,
            CASE WHEN about >= 1 THEN n END, CASE WHEN about >= 2 THEN n END, CASE WHEN about >= 3 THEN n END,
            CASE about
                WHEN 0 THEN jsonb_build_object('association_id', md5(n::text), 'instances', 3, 'calling_ae',
                    'CT' || lpad((n % 12)::text, 2, '0'), 'called_ae', 'MEDPRUNER', 'peer_address', '192.0.2.' || n % 12,
                    'instances_sha256', md5(n::text) || md5('i' || n))
                WHEN 1 THEN jsonb_build_object('attempt', 1, 'fence', 1, 'route', 'chest', 'revision', 1)
                WHEN 2 THEN jsonb_build_object('kind_of_result', 'sr-comprehensive3d', 'sha256', md5(n::text) || md5('r'))
                ELSE jsonb_build_object('destination', 'pacs', 'status', 0, 'attempt', 1) END,
            CASE WHEN about = 0 THEN md5('v' || n) || md5(n::text) END
        FROM generate_series(1, :studies) n, generate_series(1, :each) e, LATERAL (
            SELECT (ARRAY['instances-received', 'study-opened', 'study-complete', 'analysis-queued', 'analysis-started',
                'analysis-read', 'result-built', 'analysis-done', 'delivery-delivered', 'study-viewed'])[1 + (e - 1) % 10],
                (ARRAY['service/ingest', 'service/dispatch', 'gpu1/1234', 'service/deliver', 'web/somebody'])[1 + (e - 1) % 5],
                (ARRAY[0, 0, 0, 1, 1, 1, 2, 1, 3, 0])[1 + (e - 1) % 10]) k (kind, actor, about)""",
}


def fill(url: str, studies: int, events: int) -> Iterator[tuple[str, int]]:
    """Make the rows on a database with all migrations, table by table; each table with its number of rows."""
    parameters = {
        "studies": studies,
        "each": max(1, events // studies),
        "settings": json.dumps(SETTINGS),
        "pruning": json.dumps(PRUNING),
        "model": json.dumps(MODEL),
        "per_input": json.dumps(PER_INPUT),
    }
    engine = create_engine(url)
    try:
        for table, statement in STATEMENTS.items():
            with engine.begin() as connection:
                count = connection.execute(
                    text(statement), {k: v for k, v in parameters.items() if f":{k}" in statement}
                )
                yield table, count.rowcount
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in ("study", "analysis", "result", "audit_event"):  # the rows above brought their ids along
                connection.execute(text(f"SELECT setval('{table}_id_seq', (SELECT max(id) FROM {table}))"))
            connection.execute(text("VACUUM ANALYZE"))
    finally:
        engine.dispose()


def chain_all(url: str) -> int:
    """Give every event its place by COPY: what the chainer does in batches beside its writers, for an empty chain."""
    parsed = make_url(url)
    where = psycopg.conninfo.make_conninfo(
        host=parsed.host, port=parsed.port, user=parsed.username, password=parsed.password, dbname=parsed.database
    )
    digest, seq = chain.GENESIS, 0
    with psycopg.connect(where) as reading, psycopg.connect(where) as writing:
        with (
            reading.cursor(name="events") as events,
            writing.cursor() as cursor,
            cursor.copy("COPY audit_chain (seq, event_id, hash) FROM STDIN") as places,
        ):
            events.execute(f"SELECT e.id, {chain.FIELDS_OF['postgresql']} FROM audit_event e ORDER BY e.id")
            while rows := events.fetchmany(chain.PAGE):
                lines = []
                for row in rows:  # all of these are ASCII; `verify` would find any that is not
                    seq, digest = seq + 1, hashlib.sha256(digest + chain.canonical_quickly(row)).digest()
                    lines.append(f"{seq}\t{row[0]}\t{digest.hex()}\n")
                places.write("".join(lines))
        writing.commit()
        writing.autocommit = True
        writing.execute("VACUUM ANALYZE audit_chain")
    return seq
