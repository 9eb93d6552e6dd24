"""The error rates of Tables II to VI of arXiv:2603.17558: CER for Chinese, Japanese, Korean and Thai, WER elsewhere."""

SETTINGS = {1: "source", 2: "target_1h"}  # the training data of each stage, as conf/paper.yaml names them
PROFILE = "whisper"
_SETS = """
msr86k_en_dev msr86k_fr_dev msr86k_th_dev wenetspeech_zh_test_meeting wenetspeech_zh_test_net
commonvoice_th_test librispeech_en_test_clean librispeech_en_test_other
mls_de_test mls_es_test mls_fr_test mls_it_test msr86k_ru_dev msr86k_vi_dev
commonvoice_ar_test commonvoice_ja_test commonvoice_ko_test commonvoice_pt_test
""".split()
# In the order above: source-domain sets (Tables II and III), high-resource (IV, V) and low-resource target sets (VI).
_CHUNKED = """
stage1                4.65  9.24  4.20 16.55  9.60
vanilla               4.88 10.74 13.58 18.51 12.12 1.47 2.77 5.88 9.57 6.31 8.31 12.57 9.59 6.64 62.32 48.93 38.37 33.49
flylora               4.87 10.65  7.99 17.57 11.86 1.57 2.80 5.90 9.71 6.48 8.28 12.92 9.70 6.75 65.20 49.75 39.02 33.58
independent           4.86 11.07  7.72 17.24 11.63 1.30 2.60 5.63 9.08 5.67 8.02 11.65 9.40 6.33 45.24 37.84 25.98 25.15
zipper_static         4.91 11.35  7.85 18.12 12.11 1.35 2.73 5.58 9.20 6.10 8.15 11.87 9.31 6.41 42.36 37.51 25.65 23.26
zipper_hard           4.79 11.06  7.59 17.49 11.61 1.35 2.62 5.53 9.15 5.69 8.03 11.71 9.44 6.36 43.07 37.10 25.80 23.86
zipper_soft           4.88 11.26  7.79 17.90 11.93 1.31 2.61 5.54 9.15 5.62 8.03 11.75 9.37 6.32 41.72 35.77 24.37 23.89
zipper_soft_initial_b 5.06 11.53  8.05 17.96 12.02 1.26 2.56 5.45 8.93 5.31 7.90 11.10 9.21 6.15 38.64 35.21 21.87 24.29
"""
_FULL = """
stage1                4.59  9.29  4.05 17.16 10.22
vanilla               4.40 10.10 12.04 18.40 12.38 1.48 2.66 5.65 8.52 5.27 8.26 11.86 9.05 6.31 53.08 46.28 36.03 29.30
flylora               4.43 10.10  7.10 18.25 12.31 1.49 2.70 5.68 9.04 5.79 8.13 12.36 9.23 6.51 55.01 46.86 35.99 30.16
independent           4.59 10.86  7.50 17.58 11.76 1.36 2.53 5.44 8.36 5.05 8.09 11.66 9.02 6.13 41.01 37.53 24.53 23.82
zipper_static         4.64 11.07  7.70 17.68 11.97 1.30 2.52 5.45 8.53 5.00 7.96 11.95 8.97 6.18 40.32 36.61 23.39 24.61
zipper_hard           4.53 10.78  7.40 18.06 11.79 1.35 2.56 5.49 8.39 4.86 7.82 11.36 8.94 6.19 40.89 36.55 24.61 23.96
zipper_soft           4.59 11.02  7.52 17.99 11.90 1.36 2.55 5.47 8.38 4.86 7.84 11.41 8.87 6.11 40.07 35.66 22.55 23.47
zipper_soft_initial_b 4.69 11.24  7.69 17.83 11.94 1.32 2.53 5.38 8.20 4.84 7.50 11.09 8.79 5.94 36.94 34.04 21.35 23.22
"""


def _parse(table: str) -> dict[str, dict[str, float]]:
    rows = (line.split() for line in table.strip().splitlines())
    return {system: dict(zip(_SETS, map(float, rates))) for system, *rates in rows}


RATES = {"chunked": _parse(_CHUNKED), "full": _parse(_FULL)}  # {encoder: {system: {set: percent}}}
