"""Run-time defaults: our section of a settings.ini, and files of other programs that bear the same name."""
import pytest

from mmembed.core.settings import Settings, settings

NBDEV = '[DEFAULT]\nrepo = wonder\nlib_name = %(repo)s\nlib_path = wonder\nnbs_path = nbs\nversion = 0.1\n'
OTHERS = {
    'nbdev': NBDEV,
    'a section of its own': '[tool]\nseed = x\n',
    'a name like ours': '[DEFAULT]\nseed = 7\nbranch = main\n',
    'no section': 'seed = 7\n',
    'twice the same': '[a]\nx = 1\nx = 2\n',
    'nothing': '',
}


@pytest.mark.parametrize('content', OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_program_is_passed_over(tmp_path, content):
    (tmp_path/'settings.ini').write_text('[mmembed]\nseed = 3\nruns_path = out\n')
    (tmp_path/'deep'/'er').mkdir(parents=True)
    (tmp_path/'deep'/'settings.ini').write_text(content)
    assert settings(tmp_path/'deep'/'er')[:4] == ('data', str(tmp_path.resolve()/'out'), 'artifacts', 3)


def test_bytes_of_another_program_are_passed_over(tmp_path):
    (tmp_path/'settings.ini').write_bytes(b'\xff\xfe[\x00t')
    assert settings(tmp_path) == Settings()


def test_our_section_stands_beside_others(tmp_path):
    (tmp_path/'settings.ini').write_text(NBDEV + '[mmembed]\nseed = 4\n', encoding='utf-8-sig')
    assert settings(tmp_path).seed == 4


def test_the_older_form_reads(tmp_path):
    (tmp_path/'settings.ini').write_text('[DEFAULT]\ndata_path = d\nseed = 5\n')
    assert settings(tmp_path).seed == 5 and settings(tmp_path).data_path == str(tmp_path.resolve()/'d')


@pytest.mark.parametrize(
    'content, says',
    [
        ('[mmembed]\nsed = 7\n', "unknown key 'sed'"),
        ('[mmembed]\nseed = x\n', 'seed must be a whole number'),
        ('[mmembed]\nseed = 1\nseed = 2\n', 'cannot be read'),
        ('[mmembed]\nseed\n', 'cannot be read'),
    ],
)
def test_mistakes_in_our_section_are_told(tmp_path, content, says):
    (tmp_path/'settings.ini').write_text(content)
    with pytest.raises(ValueError, match=says) as e: settings(tmp_path)
    assert '\n' not in str(e.value) and 'settings.ini' in str(e.value)
