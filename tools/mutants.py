"""Changes of the code that tests must notice: `python tools/mutants.py [--only NAME ...] [--list]`.

Each is made alone in a copy of the project; of the tests that are named with it at least one has to fail then. The
exit status is 1 when a
change survives, or cannot be judged because its tests fail or are skipped without it."""
import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds: a change that makes its tests hang is noticed, too
LEFT_OUT = shutil.ignore_patterns(
    '.*', '__pycache__', '*.egg-info', 'build', 'dist', 'runs', 'artifacts', 'node_modules'
)


class Mutant(NamedTuple):
    "A change of one file"
    name: str   # ROOM/what is changed
    file: str   # below the project
    old: str    # occurs once in it
    new: str
    tests: str  # FILE::FUNCTION, with blanks between several: the quickest that must notice


TABLE = [
    Mutant(*row)
    for row in (
        # ---- text
        (
            'text/overlong UTF-8',
            'mmembed/text/unicode.py',
            'high[0xF4] = 0xA0, 0x9F',
            'high[0xF4] = 0x80, 0x9F',
            'tests/text/test_pipeline.py::test_invalid_utf8',
        ),
        (
            'text/unknown words',
            'mmembed/text/wordpiece.py',
            'dtype=torch.bool).index_fill(0, word.index_select(0, stuck), False)',
            'dtype=torch.bool).index_fill(0, word.index_select(0, stuck), True)',
            'tests/text/test_pipeline.py::test_random_strings',
        ),
        (
            'text/longest word',
            'mmembed/text/wordpiece.py',
            'fits = (left <= self.max_chars)',
            'fits = (left < self.max_chars)',
            'tests/text/test_pipeline.py::test_pieces_by_rounds_and_at_once',
        ),
        (
            'text/padding to a multiple',
            'mmembed/text/pipeline.py',
            '(longest + self.pad_to - 1) // self.pad_to * self.pad_to',
            '(longest + self.pad_to) // self.pad_to * self.pad_to',
            'tests/text/test_pipeline.py::test_padding_rule',
        ),
        (
            'text/truncation leaves room', 'mmembed/text/pipeline.py', '.clamp(max=self.max_length - edge)  # (B,)',
            '.clamp(max=self.max_length)  # (B,)', 'tests/text/test_pipeline.py::test_truncation',
        ),
        (
            'text/pairs are cut evenly',
            'mmembed/text/pipeline.py',
            'room // 2 + room % 2',
            'room // 2',
            'tests/text/test_inputs.py::test_pairs_are_cut_as_the_reference_does',
        ),
        (
            'text/overlapping merges',
            'mmembed/text/bpe.py',
            'if far or bool((hit[1:] - hit[:-1] == 1).any()): hit',
            'if far: hit',
            'tests/text/test_bpe.py::test_made_up_merges',
        ),
        (
            'text/end of a word',
            'mmembed/text/bpe.py',
            'self.last.index_select(0, b.index_select(0, tail))',
            'self.inner.index_select(0, b.index_select(0, tail))',
            'tests/text/test_bpe.py::test_random_strings',
        ),
        (
            'text/blocked marks',
            'mmembed/text/nfc.py',
            '(before < rank[1:])',
            '(before <= rank[1:])',
            'tests/exporters/graph/test_text.py::test_composition',
        ),
        (
            'text/ties of paths',
            'mmembed/text/viterbi.py',
            'top, column = total.max(1)  #',
            'top, column = total.flip(1).max(1); column = widest - 1 - column  #',
            'tests/text/test_unigram.py::test_ties_fall_as_they_do_there',
        ),
        (
            'text/final sigma',
            'mmembed/text/byte_classes.py',
            'capital[cased_left & ~cased_right]',
            'capital[cased_left]',
            'tests/text/test_bpe.py::test_open_clip_after_its_own_cleaning tests/text/test_bpe.py::test_open_clip',
        ),
        (
            'text/longest added token',
            'mmembed/text/pretokenize.py',
            "key=lambda k: len(tokens[k]['content']))",
            "key=lambda k: -len(tokens[k]['content']))",
            'tests/text/test_pipeline.py::test_tokens_added_without_being_special '
            'tests/text/test_bpe.py::test_random_strings',
        ),
        (
            'text/signs alone',
            'mmembed/text/wordlevel.py',
            '((kind != before[:n]) | (kind == alone))',
            '(kind != before[:n])',
            'tests/text/test_wordlevel.py::test_random_strings',
        ),
        # ---- images
        (
            'vision/middle of odd remainders',
            'mmembed/vision/resize.py',
            'else int(round((n - wanted) / 2.0))',
            'else (n - wanted + 1) // 2',
            'tests/vision/test_resize.py::test_crop_is_torchvisions_and_open_clips',
        ),
        (
            'vision/bicubic kernel',
            'mmembed/vision/resize.py',
            '(1.5 * x - 2.5) * x * x',
            '(1.25 * x - 2.25) * x * x',
            'tests/vision/test_resize.py::test_pillow_resize_of_noise',
        ),
        (
            'vision/rounding of a pass',
            'mmembed/vision/resize.py',
            'y.add_(2097152.0)',
            'y.add_(0.0)',
            'tests/vision/test_resize.py::test_pillow_resize_of_noise',
        ),
        (
            'vision/orientation',
            'mmembed/vision/decode.py',
            'if orientation == 2 or orientation == 6:',
            'if orientation == 2 or orientation == 8:',
            'tests/vision/test_decode.py::test_upright_where_torchcodec_does_not_look',
        ),
        (
            'vision/behind transparency',
            'mmembed/core/images.py',
            "x = (255 - strip if alpha == 'white' else strip)",
            "x = (strip if alpha == 'white' else 255 - strip)",
            'tests/vision/test_decode.py::test_every_level_with_every_alpha',
        ),
        (
            'vision/rounding of transparency',
            'mmembed/core/images.py',
            '.mul_(a).add_(128)',
            '.mul_(a)',
            'tests/vision/test_decode.py::test_every_level_with_every_alpha',
        ),
        (
            'vision/most pixels',
            'mmembed/vision/probe.py',
            'elif i.width * i.height * frames > max_pixels',
            'elif i.width * i.height > max_pixels',
            'tests/vision/test_decode.py::test_an_animation_costs_its_first_frame',
        ),
        (
            'vision/standard deviation',
            'mmembed/vision/pipeline.py',
            '.sub_(mean).div_(std)',
            '.sub_(mean).mul_(std)',
            'tests/vision/test_pipeline.py::test_normalize_is_torchvisions',
        ),
        (
            'vision/how often mirrored',
            'mmembed/vision/augment.py',
            'image.flip(2) if float(torch.rand([1], generator=generator)) < p else image',
            'image.flip(2) if float(torch.rand([1], generator=generator)) < p / 2 else image',
            'tests/vision/test_augment.py::test_flip_is_as_often_as_asked',
        ),
        (
            'vision/shape of crops',
            'mmembed/vision/augment.py',
            'w, h = int(round(math.sqrt(area * shape))), int(round(math.sqrt(area / shape)))',
            'h, w = int(round(math.sqrt(area * shape))), int(round(math.sqrt(area / shape)))',
            'tests/vision/test_augment.py::test_crops_are_distributed_as_torchvisions',
        ),
        # ---- data
        (
            'data/groups stay together',
            'mmembed/data/source.py',
            'unit_hash(self.group(i)) < share',
            'unit_hash(self.name(i)) < share',
            'tests/data/test_tables.py::test_split_keeps_groups_together_and_rows_in_place',
        ),
        (
            'data/rows of a rank',
            'mmembed/train/loader.py',
            '[self.rank::self.num_replicas][self.start:len(self)]',
            '[self.start:len(self)]',
            'tests/train/test_datamodule.py::test_ranks_share_the_data',
        ),
        (
            'data/crops of an epoch',
            'mmembed/train/batches.py',
            'manual_seed(hash((self.seed, epoch, i)))',
            'manual_seed(hash((self.seed, i)))',
            'tests/train/test_datamodule.py::test_training_batches_are_augment_of_the_pipeline',
        ),
        (
            'data/strict runs',
            'mmembed/train/batches.py',
            'if self.ledger is None: raise',
            'if self.ledger is None and not reason: raise',
            'tests/train/test_datamodule.py::test_strict_runs_stop_at_a_broken_image',
        ),
        (
            'data/small sets',
            'mmembed/train/datamodule.py',
            "'drop_last': len(order) >= size",
            "'drop_last': True",
            'tests/train/test_datamodule.py::test_small_data_is_not_dropped',
        ),
        (
            'data/batches of every rank',
            'mmembed/train/loader.py',
            'while n % world and (most - 1) % batch_size == 0:',
            'while n % world and most % batch_size == 0:',
            'tests/train/test_loader.py::test_validation_shares',
        ),
        (
            'data/leaks into the test part',
            'mmembed/data/splits.py',
            "if train and part in ('valid', 'test')",
            "if train and part == 'valid'",
            'tests/data/test_splits.py::test_survey tests/data/test_splits.py::test_a_third_part',
        ),
        (
            'data/mismatches of one class',
            'mmembed/train/pair_data.py',
            '\n                and not (label and label == self.source.label(b)))',
            ')',
            'tests/train/test_pair_data.py::test_rows_of_one_class_do_not_mismatch',
        ),
        # ---- models
        (
            'models/shared captions',
            'mmembed/models/losses.py',
            'match = own if same is None else same | own',
            'match = own',
            'tests/models/test_losses.py::test_as_written_out',
        ),
        (
            'models/loss of both directions',
            'mmembed/models/losses.py',
            'return (F.cross_entropy(logits, target) + F.cross_entropy(back, target)) / 2',
            'return F.cross_entropy(logits, target)',
            'tests/models/test_losses.py::test_same_as_open_clip',
        ),
        (
            'models/scale of the sigmoid loss',
            'mmembed/models/losses.py',
            'torch.where(match, logits, -logits)).sum() / max(1, len(logits))',
            'torch.where(match, logits, -logits)).mean()',
            'tests/models/test_losses.py::test_sigmoid_as_written_out_and_as_open_clip',
        ),
        (
            'models/ties against the model',
            'mmembed/models/metrics.py',
            '((scores >= best) |',
            '((scores > best) |',
            'tests/models/test_metrics.py::test_a_collapsed_model_finds_nothing',
        ),
        (
            'models/NaN never helps',
            'mmembed/models/metrics.py',
            '| scores.isnan()).logical_and(~relevant)',
            ').logical_and(~relevant)',
            'tests/models/test_metrics.py::test_nan_never_helps',
        ),
        (
            'models/chance',
            'mmembed/models/metrics.py',
            '(N - right - j).clamp(min=0)',
            '(N - right).clamp(min=0)',
            'tests/models/test_metrics.py::test_chance_is_what_guessing_gives',
        ),
        (
            'models/unit length',
            'mmembed/models/dual.py',
            'F.normalize(self.text_proj(self.text(tokens)), dim=-1)',
            'self.text_proj(self.text(tokens))',
            'tests/models/test_dual.py::test_unit_vectors_and_scale',
        ),
        (
            'models/rate of a layer',
            'mmembed/train/finetune.py',
            'layer_decay ** (top + 1 - height[k])',
            'layer_decay ** (top - height[k])',
            'tests/train/test_finetune.py::test_groups_hold_every_parameter_once_at_its_rate',
        ),
        (
            'models/weight decay of biases',
            'mmembed/train/finetune.py',
            'decays = p.ndim > 1 and',
            'decays = p.ndim > 0 and',
            'tests/train/test_finetune.py::test_groups_hold_every_parameter_once_at_its_rate',
        ),
        (
            'models/locked layers', 'mmembed/train/finetune.py', 'height[k] > blocks - n or',
            'height[k] >= blocks - n or', 'tests/train/test_finetune.py::test_locks',
        ),
        (
            'models/mixture of weights',
            'mmembed/train/finetune.py',
            'torch.lerp(before[k], b, alpha)',
            'torch.lerp(before[k], b, 1 - alpha)',
            'tests/train/test_finetune.py::test_wise_ft_lies_between',
        ),
        (
            'models/padding in a mean',
            'mmembed/models/towers.py',
            'weight = tokens.mask[:, :, None].to(',
            'weight = torch.ones_like(tokens.mask)[:, :, None].to(',
            'tests/models/test_towers.py::test_padding_is_not_seen',
        ),
        # ---- training
        (
            'train/decay of the average',
            'mmembed/train/shell.py',
            'EMAWeightAveraging(decay=self.hparams.ema)',
            'EMAWeightAveraging(decay=0.999)',
            'tests/train/test_run.py::test_the_average_of_the_weights_has_its_decay',
        ),
        (
            'train/best is the least',
            'mmembed/train/config.py',
            "mode='max', save_on",
            "mode='min', save_on",
            'tests/train/test_run.py::test_the_best_checkpoint_has_the_highest_figure',
        ),
        (
            'train/patience with the least',
            'mmembed/train/config.py',
            "EarlyStopping(monitor, mode='max'",
            "EarlyStopping(monitor, mode='min'",
            'tests/train/test_run.py::test_the_best_checkpoint_has_the_highest_figure',
        ),
        (
            'train/layer_decay ignored',
            'mmembed/train/shell.py',
            'h.lr, h.weight_decay, h.layer_decay)',
            'h.lr, h.weight_decay)',
            'tests/train/test_run.py::test_layers_learn_at_the_rates_of_the_configuration',
        ),
        (
            'train/warm-up', 'mmembed/train/shell.py', 'if step < up: return (step + 1) / up',
            'if step < up: return step / up', 'tests/train/test_run.py::test_schedule',
        ),
        (
            'train/logit scale',
            'mmembed/train/modules.py',
            'clamp_(max=math.log(self.hparams.max_logit_scale))',
            'clamp_(max=self.hparams.max_logit_scale)',
            'tests/train/test_run.py::test_the_logit_scale_is_held',
        ),
        # ---- export
        (
            'export/mean of the differences',
            'mmembed/exporters/verify/report.py',
            'd = float((w.double() - g.double()).abs().max())',
            'd = float((w.double() - g.double()).abs().mean())',
            'tests/exporters/verify/test_verify.py::test_the_difference_is_the_largest_and_not_the_mean',
        ),
        (
            'export/not a number',
            'mmembed/exporters/verify/report.py',
            "worst = max(worst, d if d == d else float('inf'))",
            'worst = max(worst, d)',
            'tests/exporters/verify/test_verify.py::test_a_value_that_is_not_a_number_is_a_difference',
        ),
        (
            'export/shapes in the hash',
            'mmembed/exporters/card.py',
            "put(f'{name} {t.dtype} {tuple(t.shape)}'.encode())",
            "put(f'{name} {t.dtype}'.encode())",
            'tests/exporters/test_card.py::test_tensor_hash_sees_names_types_and_shapes',
        ),
        (
            'export/paths in the card',
            'mmembed/exporters/card.py',
            "return PurePath(x).name if PurePath(x).is_absolute() or x.startswith('~') else x",
            'return x',
            'tests/exporters/test_card.py::test_training_record_holds_no_examples_and_no_paths',
        ),
        (
            'export/files of an older commit',
            'mmembed/runtime/artifact.py',
            'version > FORMAT_VERSION',
            'version >= FORMAT_VERSION',
            'tests/exporters/test_old_artifact.py::test_an_old_file_answers_equally',
        ),
        # ---- running a file
        (
            'runtime/order of equal scores',
            'mmembed/runtime/results.py',
            'descending=True, stable=True)',
            'descending=True)',
            'tests/runtime/test_embedder.py::test_equal_scores_keep_the_order_of_the_candidates',
        ),
        (
            'runtime/scores of failed pairs',
            'mmembed/runtime/embedder.py',
            "on_error, Scored, float('nan'))",
            'on_error, Scored, 0.)',
            'tests/runtime/test_embedder.py::test_bad_pairs',
        ),
        (
            'runtime/item in a message',
            'mmembed/runtime/results.py',
            "raise ValueError(f'{name}[{len(errors) - 1}]",
            "raise ValueError(f'{name}[{len(errors)}]",
            'tests/runtime/test_embedder.py::test_errors_name_the_item_everywhere',
        ),
        (
            'runtime/order of lengths',
            'mmembed/runtime/loaded.py',
            'torch.cat(parts)[torch.cat(places).argsort()]',
            'torch.cat(parts)',
            'tests/runtime/test_embedder.py::test_texts_of_many_lengths_come_back_in_their_order',
        ),
        (
            'runtime/sigmoid or softmax',
            'mmembed/runtime/results.py',
            '(known.sigmoid() if sigmoid else',
            '(known.softmax(-1) if sigmoid else',
            'tests/runtime/test_embedder.py::test_probabilities_follow_the_kind_of_model',
        ),
        (
            'runtime/beginning of a long text',
            'mmembed/runtime/inputs.py',
            'if ends and fills(head[:ends[-1]]): return',
            'if ends: return',
            'tests/runtime/test_embedder.py::test_a_beginning_that_fills_no_row_is_not_enough',
        ),
        (
            'runtime/words that name an image',
            'mmembed/core/markers.py',
            "if text[:11].lower() == 'data:image/': return True",
            "if text[:11].lower() == 'data:image/': return False",
            'tests/core/test_markers.py::test_what_names_an_image',
        ),
        # ---- jobs
        (
            'jobs/fsync of the folder',
            'mmembed/core/files.py',
            'try: os.fsync(handle)',
            'try: pass',
            'tests/retrieval/test_embed.py::test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end',
        ),
        (
            'jobs/fsync of the file',
            'mmembed/core/files.py',
            "with temporary.open('rb') as f: os.fsync(f.fileno())",
            "with temporary.open('rb') as f: f.fileno()",
            'tests/retrieval/test_embed.py::test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end',
        ),
        (
            'jobs/rows of a part',
            'mmembed/retrieval/parts.py',
            'return about.num_rows == len(job.shard(k))',
            'return True',
            'tests/retrieval/test_embed.py::test_a_part_with_fewer_rows_is_made_again',
        ),
        (
            'jobs/failures of the last part',
            'mmembed/retrieval/parts.py',
            "        for k in range(job.shards()):\n            bad =",
            "        for k in range(job.shards() - 1):\n            bad =",
            'tests/retrieval/test_embed.py::test_failures_of_every_part_are_listed',
        ),
        (
            'jobs/finite vectors',
            'mmembed/retrieval/parts.py',
            'finite &= v.isfinite().all(1)',
            'finite &= v.isfinite().any(1)',
            'tests/retrieval/test_embed.py::test_not_finite_is_no_vector',
        ),
        (
            'jobs/bits beyond the vector',
            'mmembed/core/quantize.py',
            'if dim > 0: signs = signs[:, :dim]',
            'pass',
            'tests/retrieval/test_embed.py::test_precision_round_trip',
        ),
        (
            'jobs/the int8 rule of an older manifest',
            'mmembed/retrieval/parts.py',
            "if 'int8' not in there and",
            'if False and',
            'tests/retrieval/test_embed.py::test_a_job_of_the_older_int8_is_finished_by_its_rule',
        ),
        (
            'jobs/one at a time',
            'mmembed/core/files.py',
            'fcntl.LOCK_EX | (0 if wait',
            'fcntl.LOCK_SH | (0 if wait',
            'tests/retrieval/test_embed.py::test_one_job_at_a_time',
        ),
        (
            'jobs/parts of another artifact',
            'mmembed/retrieval/parts.py',
            'if found != here: raise',
            'if not there: raise',
            'tests/retrieval/test_embed.py::test_parts_of_another_artifact_are_found_out',
        ),
        # ---- index
        (
            'index/constant of reciprocal ranks',
            'mmembed/retrieval/query.py',
            '1 / (60 + place)',
            '1 / (10 + place)',
            'tests/retrieval/test_index.py::test_two_rankings_are_merged_by_reciprocal_ranks',
        ),
        (
            'index/cosine of a distance',
            'mmembed/retrieval/index.py',
            "'score': 1 - row.pop('_distance')",
            "'score': row.pop('_distance')",
            'tests/retrieval/test_index.py::test_every_query_finds_what_brute_force_finds',
        ),
        (
            'index/what is subtracted',
            'mmembed/retrieval/query.py',
            'return self + Query(other, -1)',
            'return self + Query(other)',
            'tests/retrieval/test_index.py::test_sums_of_queries',
        ),
        (
            'index/pairs of a row with itself',
            'mmembed/retrieval/clusters.py',
            'keep = b > a',
            'keep = b >= a',
            'tests/retrieval/test_index.py::test_near_pairs_are_told_once_and_in_order',
        ),
        (
            'index/vectors of zero',
            'mmembed/retrieval/ingest.py',
            'length[k] < 1e-12: reason =',
            'length[k] < 0: reason =',
            'tests/retrieval/test_index.py::test_vectors_that_mean_nothing',
        ),
        # ---- serving
        (
            'serve/index of a mixed request',
            'mmembed/serve/entries.py',
            'for at, i in enumerate(items): i.index = at',
            'pass',
            'tests/serve/test_http.py::test_answers_are_numbered_by_their_places_in_the_request '
            'tests/serve/test_clients.py::test_a_request_in_parts_is_numbered_as_a_whole',
        ),
        (
            'serve/time of a request',
            'mmembed/serve/service.py',
            'timeout = min(timeout or 1e9, self.config.engine.timeout)',
            'timeout = timeout or self.config.engine.timeout',
            'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives',
        ),
        (
            'serve/time of a long request',
            'mmembed/serve/entries.py',
            'min(timeout or options.timeout, options.timeout)',
            '(timeout or options.timeout)',
            'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives',
        ),
        (
            'serve/time of downloads',
            'mmembed/serve/entries.py',
            'min(seconds or 1e9, service.config.engine.timeout)',
            '(seconds or service.config.engine.timeout)',
            'tests/serve/test_budgets.py::test_a_client_gets_no_more_time_than_the_server_gives',
        ),
        (
            'serve/order of equal candidates',
            'mmembed/serve/tasks.py',
            "for k in np.argsort(-score, kind='stable')\n        ]",
            'for k in np.argsort(-score)\n        ]',
            'tests/serve/test_http.py::test_equal_scores_keep_the_order_of_the_request',
        ),
        (
            'serve/order of equal labels',
            'mmembed/serve/tasks.py',
            "np.argsort(-score, kind='stable')[: top_k or None]",
            'np.argsort(-score)[: top_k or None]',
            'tests/serve/test_http.py::test_equal_scores_keep_the_order_of_the_request',
        ),
        (
            'serve/settled once',
            'mmembed/serve/queue.py',
            'if item.status: return False',
            'if not self._left: return False',
            'tests/serve/test_queue.py::test_an_item_is_settled_once',
        ),
        (
            'serve/shares of requests',
            'mmembed/serve/queue.py',
            'job.had.get(self.owner, 0), len(self.queues[job])',
            '0, len(self.queues[job])',
            'tests/serve/test_queue.py::test_places_are_shared_between_requests '
            'tests/serve/test_queue.py::test_a_large_request_keeps_half_of_the_places',
        ),
        (
            'serve/urgent first',
            'mmembed/serve/queue.py',
            'return -1 if job.urgent else job.had',
            'return job.had',
            'tests/serve/test_queue.py::test_an_urgent_request_goes_before_all_singles',
        ),
        (
            'serve/bound of the queue',
            'mmembed/serve/engine.py',
            'self.waiting[k] + n > self.options.queue',
            'self.waiting[k] > self.options.queue',
            'tests/serve/test_engine.py::test_queue_is_bounded_and_whole_requests_are_admitted',
        ),
        (
            'serve/status of what came late',
            'mmembed/serve/schemas.py',
            "('expired', 504)",
            "('expired', 503)",
            'tests/serve/test_http.py::test_the_time_of_a_request_is_limited',
        ),
        (
            'serve/times that cannot be',
            'mmembed/serve/endpoints.py',
            'not 0 < seconds < 1e6',
            'not seconds < 1e6',
            'tests/serve/test_http.py::test_mistakes_have_their_status',
        ),
        (
            'serve/hosts to fetch from',
            'mmembed/serve/entries.py',
            'if not forms & {h.lower() for h in hosts}:',
            'if not hosts:',
            'tests/serve/test_fetch.py::test_ports_are_named',
        ),
        (
            'serve/keys',
            'mmembed/serve/service.py',
            "hmac.compare_digest((key or '').encode(), k.encode())",
            "k.startswith(key or '')",
            'tests/serve/test_keys.py::test_a_blank_key_opens_nothing '
            'tests/serve/test_keys.py::test_every_route_needs_a_key',
        ),
        # ---- the demo
        (
            'demo/changed files',
            'mmembed/demo/gallery.py',
            "if known.get(f, ('',))[0] != s or not s]",
            'if f not in known]',
            'tests/demo/test_demo.py::test_a_folder_embeds_only_what_is_new',
        ),
        (
            'demo/filter',
            'mmembed/demo/handlers.py',
            'q.where, q.words)',
            "'', q.words)",
            'tests/demo/test_demo.py::test_filter_and_words_of_an_index',
        ),
        (
            'demo/templates', 'mmembed/demo/match.py', 't.view(len(names), len(forms), -1).mean(1)',
            't.view(len(names), len(forms), -1)[:, 0]', 'tests/demo/test_demo.py::test_match',
        ),
        # ---- commands
        (
            'commands/status of an error',
            'mmembed/cli/main.py',
            "{typed(sentence(e))}', file=sys.stderr)\n        return 1",
            "{typed(sentence(e))}', file=sys.stderr)\n        return 0",
            'tests/cli/test_main.py::test_mistakes_end_in_one_sentence',
        ),
        (
            'commands/status of a wrong call',
            'mmembed/cli/main.py',
            "{unknown(argv)}', file=sys.stderr)\n        return 2",
            "{unknown(argv)}', file=sys.stderr)\n        return 0",
            'tests/cli/test_main.py::test_wrong_calls_name_the_next_step',
        ),
        (
            'commands/what was not indexed', 'mmembed/cli/search.py',
            'if len(bad) > known: raise SystemExit(1)', 'pass', 'tests/retrieval/test_index.py::test_commands',
        ),
    )
]


def functions(path: Path) -> set[str]:
    "The names of the test functions in a file."
    return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}


def faults(table: list[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the table itself: old text that does not occur exactly once, a change that is no Python,
    tests that do not exist."""
    found = [f'{name} stands {n} times in the table' for name, n in Counter(m.name for m in table).items() if n > 1]
    for m in table:
        text = (root/m.file).read_text() if (root/m.file).is_file() else ''
        if (n := text.count(m.old)) != 1: found.append(f'{m.name}: the old text occurs {n} times in {m.file}')
        elif m.new == m.old: found.append(f'{m.name}: the change changes nothing')
        else:
            try:
                ast.parse(text.replace(m.old, m.new))
            except SyntaxError as e:
                found.append(f'{m.name}: {m.file} is no Python with the change: {e.msg}, line {e.lineno}')
        if not m.tests.split(): found.append(f'{m.name}: no test is named')
        for test in m.tests.split():
            path, _, name = test.partition('::')
            if not (root / path).is_file() or name not in functions(root / path):
                found.append(f'{m.name}: there is no test {test}')
    return found


def outcomes(root: Path, tests: list[str], *options: str) -> dict[str, Counter] | None:
    """What became of each test function, in a process of its own: how many of its cases 'passed', 'failed' or were
    'skipped'. None: it took too long."""
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1',
                            MMEMBED_DATA=os.environ.get('MMEMBED_DATA') or str(ROOT.parent/'shared'/'data'))
    report = root/'.outcomes.xml'
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-n',
        '0',
        '-p',
        'no:cacheprovider',
        f'--junitxml={report}',
        *options,
        *tests,
    ]
    process = subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try: said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return None
    if process.returncode not in (0, 1): raise RuntimeError(f'pytest cannot run {" ".join(tests)}:\n{said[-3000:]}')
    found: dict[str, Counter] = defaultdict(Counter)
    for case in ET.parse(report).iter('testcase'):
        kinds = {child.tag for child in case}
        kind = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
        name = case.get('classname').replace('.', '/') + '.py::' + case.get('name').partition('[')[0]
        found[name][kind] += 1
    return dict(found)


def written(path: Path, text: str):
    "Writes a module, and forgets what was compiled of it: a change of equal length within a second would not be seen."
    path.write_text(text)
    for left in (path.parent/'__pycache__').glob(f'{path.stem}.*.pyc'): left.unlink()


def judged(
    table: list[Mutant], root: Path = ROOT, say=print
) -> dict[str, str]:  # name: 'noticed', 'survived', or why it is neither
    "The verdict on every change; the project itself stays as it is."
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix='mmembed-mutants-') as folder:
        copy = Path(folder)/'project'
        shutil.copytree(root, copy, ignore=LEFT_OUT)
        sound = outcomes(copy, sorted({t for m in table for t in m.tests.split()})) or {}
        for n, m in enumerate(table, 1):
            usual = [t for t in m.tests.split() if sound.get(t, {}).get('passed') and not sound[t].get('failed')]
            if len(usual) < len(m.tests.split()):
                verdict = f'not judged: fails or is skipped without it: {" ".join(set(m.tests.split()) - set(usual))}'
            else:
                text = (copy/m.file).read_text()
                written(copy/m.file, text.replace(m.old, m.new))
                try:
                    found = outcomes(copy, usual, '-x')
                    failed = [t for t, kinds in (found or {}).items() if kinds['failed']]
                    verdict = (
                        'noticed: it hangs' if found is None else f'noticed: {failed[0]}' if failed else 'survived'
                    )
                except RuntimeError as e: verdict = f'not judged: {e}'
                finally: written(copy/m.file, text)
            verdicts[m.name] = verdict
            say(f'{n:3}/{len(table)}  {m.name:45} {verdict}')
    return verdicts


def main(argv: list[str] | None = None, table: list[Mutant] = TABLE, root: Path = ROOT) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='+', metavar='NAME', help='entries whose names begin so: a room, or a whole name')
    p.add_argument('--list', action='store_true', help='show the table, change nothing')
    args = p.parse_args(argv)
    if wrong := faults(table, root): print(*wrong, sep='\n', file=sys.stderr)
    some = [m for m in table if not args.only or m.name.startswith(tuple(args.only))]
    if not some: print(f'no entry begins with {" or ".join(args.only)}', file=sys.stderr)
    if wrong or not some: return 2
    if args.list:
        for m in some: print(f'{m.name}: {m.file}\n  - {m.old.strip()}\n  + {m.new.strip()}\n  {m.tests}')
        return 0
    verdicts = judged(some, root, lambda line: print(line, flush=True))
    missed = {name: v for name, v in verdicts.items() if not v.startswith('noticed')}
    print(
        f'{len(verdicts) - len(missed)} of {len(verdicts)} changes were noticed'
        + ''.join(f'\n  {name}: {v}' for name, v in missed.items())
    )
    return bool(missed)


if __name__ == '__main__': sys.exit(main())
